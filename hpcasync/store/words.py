"""int64 words that one process puts while another reads: both halves hold the number, so a half-written word shows.

MPI's atomic operations would do, but they need the target's CPU where a put does not (MPICH over shared memory or, as far as
is known, InfiniBand), and Open MPI 5.0.11 over TCP needs a third process for them, the first of the target's node (docs/mpi.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcasync.store.base import IDLE

LARGEST = (1 << 31) - 1
"""The half that stands for ``IDLE``."""


def encode(number: int) -> int:
    """The word of a number in [0, 2^31 - 1), or of ``IDLE``."""
    half = LARGEST if number == IDLE else int(number)
    return half << 32 | half


def decode(words: np.ndarray) -> np.ndarray:
    """The numbers of int64 words; -1 for a word that is half written."""
    halves = words & np.int64(LARGEST)
    numbers = np.where(words >> 32 == halves, halves, -1)
    return np.where(numbers == LARGEST, IDLE, numbers)


def whole(word: Any) -> bool:
    """Whether a word is fully written."""
    return int(word) >> 32 == int(word) & LARGEST
