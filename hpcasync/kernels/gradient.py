"""The gradient stages: which gradient the base step is given, when it is not the worker's own as it came."""

from __future__ import annotations

import numpy as np
from numba import njit

from hpcasync.kernels.codes import HYPER

_COMPENSATION, _DECAY, _EPS = HYPER["compensation"], HYPER["square_decay"], HYPER["square_eps"]
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _compensated(e, g, w, read, strength):
    """``g + lambda g g (w - w_read)``, multiplied so that no delay leaves ``g`` as it is even where ``g g`` overflows."""
    for i in range(e.size):
        e[i] = g[i] + strength * g[i] * (g[i] * (w[i] - read[i]))


@njit(**_OPTIONS)
def _compensated_adaptive(e, g, w, read, square, strength, a, rest, eps):
    """The same with ``lambda = strength / sqrt(s + eps)``, ``s = a s + (1-a) g^2``."""
    for i in range(e.size):
        s = a * square[i] + rest * g[i] * g[i]
        square[i] = s
        e[i] = g[i] + strength / np.sqrt(s + eps) * g[i] * (g[i] * (w[i] - read[i]))


@njit(**_OPTIONS)
def _sum(e, g, total, last, count):
    """Mean of every worker's newest gradient: ``sum += g - last; last = g; sum / count``."""
    for i in range(e.size):
        t = total[i] + (g[i] - last[i])
        total[i] = t
        last[i] = g[i]
        e[i] = t / count


@njit(**_OPTIONS)
def _ring(e, g, ring, slot, filled):
    """Mean of the last gradients in the ring, ``g`` among them, added up in the order of the rows."""
    row = ring[slot]
    for i in range(e.size):
        row[i] = g[i]
    _copy(e, ring[0])
    for r in range(1, filled):
        _add(e, ring[r])
    count = np.float32(filled)
    for i in range(e.size):
        e[i] = e[i] / count


@njit(**_OPTIONS)
def _copy(e, g):
    for i in range(e.size):
        e[i] = g[i]


@njit(**_OPTIONS)
def _add(e, g):
    for i in range(e.size):
        e[i] += g[i]


@njit(**_OPTIONS)
def _round(e, g, mean, count):
    """Running mean of a round or group: ``mean += (g - mean) / count``; the first gradient of it is the mean."""
    for i in range(e.size):
        m = g[i] if count == 1 else mean[i] + (g[i] - mean[i]) / count
        mean[i] = m
        e[i] = m


@njit(**_OPTIONS)
def gather(g, mean, count, w, out):
    """Take ``g`` into the running mean of a group that is not full yet, and only read ``w``."""
    for i in range(g.size):
        mean[i] = g[i] if count == 1 else mean[i] + (g[i] - mean[i]) / count
        out[i] = w[i]


@njit(**_OPTIONS)
def effective_gradient(code, e, g, w, read, state, row, private, lo, hi, h, window, count, arrival):
    """Run the gradient stage ``code`` on one block: the worker's gradient ``g`` in, the one to apply out in ``e``.

    Args:
        code: a value of ``GRADIENTS``, not "own".
        read: what the worker read, the parameters that ``g`` was taken at.
        row: first row of this stage's vectors in ``state``.
        private: the worker's own vectors.
        lo, hi: the block's elements in ``state`` and ``private``.
        window: rows of the ring.
        arrival: number of gradients in the mean.
    """
    if code == 1:
        _compensated(e, g, w, read, np.float32(h[_COMPENSATION]))
    elif code == 2:
        a, rest = np.float32(h[_DECAY]), np.float32(1 - h[_DECAY])
        square, strength = state[row, lo:hi], np.float32(h[_COMPENSATION])
        _compensated_adaptive(e, g, w, read, square, strength, a, rest, np.float32(h[_EPS]))
    elif code == 3:
        _sum(e, g, state[row, lo:hi], private[0, lo:hi], np.float32(arrival))
    elif code == 4:
        _ring(e, g, state[row : row + window, lo:hi], (count - 1) % window, min(count, window))
    else:
        _round(e, g, state[row, lo:hi], np.float32(arrival))
