"""Sums of the rows of an array that several processes share, and the counters that they tell each other by."""

from __future__ import annotations

import numpy as np
from numba import njit

from hpcasync.kernels.atomic import load_word, put

BLOCK = 2048
"""Elements that are summed at a time: they stay in the first-level cache until they are written to every row."""

COUNTED, DONE, DESCRIBED = 0, 1, 8
"""Words of a process's line: operations it has come to, operations it has done its part of, descriptions of the last ones."""

DEPTH = 64
"""Operations that are described at a time: no process may be further ahead of another."""

DESCRIPTION = 3
"""Words of a description."""

LINE = DESCRIBED + DEPTH * DESCRIPTION
"""int64 words of a process, a multiple of a cache line."""

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def announce(words: np.ndarray, me: int, word: int, value: int) -> None:
    """Tell the others that this process's counter ``word`` is now ``value``."""
    put(words.reshape(-1), me * words.shape[1] + word, value)


@njit(**_OPTIONS)
def reached(words: np.ndarray, word: int, value: int) -> bool:
    """Whether the counter ``word`` of every process is at least ``value``."""
    for r in range(words.shape[0]):  # noqa: SIM110 (numba has no all())
        if load_word(words.ctypes.data + 8 * (r * words.shape[1] + word)) < value:
            return False
    return True


@njit(**_OPTIONS)
def sum_rows(rows: np.ndarray, lo: int, hi: int, first: int, stop: int) -> None:
    """Write the sum of all rows, in their order, into the columns ``[lo, hi)`` of the rows ``[first, stop)``.

    Args:
        rows: (processes, columns), C order, float32 or float64.
    """
    total = np.empty(BLOCK, rows.dtype)
    for begin in range(lo, hi, BLOCK):
        end = min(begin + BLOCK, hi)
        part = total[: end - begin]
        row = rows[0, begin:end]
        for i in range(part.size):
            part[i] = row[i]
        for r in range(1, rows.shape[0]):
            row = rows[r, begin:end]
            for i in range(part.size):
                part[i] += row[i]
        for r in range(first, stop):
            row = rows[r, begin:end]
            for i in range(part.size):
                row[i] = part[i]
