"""int64 words that one process puts while another reads: each number is written twice, so a half-written one shows.

MPI's atomic operations would do, but they need the target's CPU where a put does not (MPICH over shared memory or, as far as
is known, InfiniBand), and Open MPI 5.0.11 over TCP needs a third process for them, the first of the target's node (docs/mpi.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

_HALF = (1 << 31) - 1


def encode(number: int) -> int:
    """The word that numbers a request, modulo 2^31: a sender has one open per shard, so only equal or not is ever asked."""
    half = number & _HALF
    return half << 32 | half


def whole(word: Any) -> bool:
    """Whether a word of ``encode`` is fully written."""
    return int(word) >> 32 == int(word) & _HALF


def pair(number: int) -> np.ndarray:
    """The two words of a number that is compared, in [0, 2^63): the second has its bytes in reverse.

    Whichever way the bytes are copied, the high ones of one word then go with the low ones of the other.
    """
    words = np.array([number, number], np.int64)
    words[1:].byteswap(inplace=True)
    return words


def numbers(words: np.ndarray) -> np.ndarray:
    """The numbers of words of ``pair``, int64 (2 n,); -1 for one that is half written."""
    first, second = words[::2], words[1::2].byteswap()
    return np.where(first == second, first, -1)
