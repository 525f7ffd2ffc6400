"""Small one-pass loops: the finite check, the scaling of an average, the block-momentum step."""

from __future__ import annotations

import numpy as np
from numba import njit

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def all_finite(values: np.ndarray) -> bool:
    """Whether a contiguous 1-D float32 array holds neither NaN nor infinity.

    An integer maximum over the exponent bits: unlike a float reduction it vectorises under strict IEEE rules.
    """
    bits = values.view(np.int32)
    mask = np.int32(0x7FFFFFFF)
    largest = np.int32(0)
    for i in range(bits.size):
        magnitude = bits[i] & mask
        largest = max(largest, magnitude)
    return bool(largest < 0x7F800000)


@njit(**_OPTIONS)
def scale(values: np.ndarray, factor: float) -> None:
    """``values *= factor`` in the dtype of ``values`` (1-D, float32 or float64)."""
    f = values.dtype.type(factor)
    for i in range(values.size):
        values[i] *= f


@njit(**_OPTIONS)
def block_update(
    total: np.ndarray, anchor: np.ndarray, velocity: np.ndarray, ranks: int, mu: float, lr: float, nesterov: bool
) -> None:
    """One block-momentum step from the sum of the ranks' parameters, in one pass.

    ``d = total / ranks - anchor``; ``v = mu v + lr d``; ``w = anchor + v``, or with Nesterov
    ``w = anchor + lr d + mu v``. The new ``w`` goes to ``total`` and to ``anchor``. All arrays 1-D, of one float dtype.

    Source: Cong, Liu, MLHPC 2020 (M-AVG); Nesterov as the outer step of DiLoCo.
    """
    one = total.dtype.type(1)
    inverse = one / total.dtype.type(ranks)
    m = total.dtype.type(mu)
    eta = total.dtype.type(lr)
    for i in range(total.size):
        mean = total[i] * inverse
        step = eta * (mean - anchor[i])
        v = m * velocity[i] + step
        velocity[i] = v
        w = anchor[i] + (step + m * v if nesterov else v)
        total[i] = w
        anchor[i] = w
