"""The elastic exchange alone, for a worker whose own steps are made elsewhere."""

from __future__ import annotations

import numpy as np
from numba import njit

from hpcasync.kernels.fused import _elastic


@njit(cache=True, nogil=True, error_model="numpy")
def exchange(state: np.ndarray, start: int, own: np.ndarray, rate: float) -> None:
    """Let ``own`` (float32, contiguous) and the elements of ``w`` from ``start`` on draw each other, as the fused pass does."""
    _elastic(state[0, start : start + own.size], own, np.float32(rate))
