"""The fused push+pull pass: base step, trend modifier and write-out over one piece of a shard.

A pass walks the piece in blocks that fit the first-level cache and runs up to four short stages on each block:
effective gradient, base step (the step ``d`` that the base optimizer would take), modifier (shrinks ``d``), apply.
Each base and each modifier is defined once, here; any base combines with any modifier. Memory is read and written once,
as in a hand-fused loop, because the intermediate ``d`` never leaves the cache; each stage touches at most five arrays, few
enough for LLVM to vectorise it with run-time alias checks.

Strict IEEE arithmetic (no fastmath, no contraction): the result of an element does not depend on where a shard or a
block begins, so any sharding gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BASES = {"sgd": 0, "momentum": 1, "nesterov": 2, "rmsprop": 3, "adam": 4, "adamw": 5, "amsgrad": 6}
"""Codes of the base steps; their state vectors are named in ``hpcasync.rules.base``."""

VARIANTS = {"none": 0, "opposed": 1, "opposed-strength": 2, "consistency": 3, "rate": 4}
"""Codes of the modifiers."""

HYPER = {
    name: i
    for i, name in enumerate(
        ("lr", "weight_decay", "momentum", "alpha", "beta1", "beta2", "eps", "trend_beta", "shrink", "floor", "up", "down")
    )
}
"""Places of the hyper-parameters in the ``hyper`` vector."""

BLOCK, PLAIN_BLOCK = 512, 1536
"""Elements, measured from 128 to 16384: short, so that the processor's prefetch goes on from one block to the next (6-20 %
at 25 M elements); longer for plain sgd, where the 80 ns that a block costs show on data in the cache."""

_TINY = np.float32(1e-30)
_ONE = np.float32(1)
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _momentum(d, g, v, lr, mu, nesterov):
    """``v = mu v + g``; ``d = -lr v``, or ``-lr (g + mu v)``."""
    for i in range(d.size):
        v[i] = mu * v[i] + g[i]
        d[i] = -lr * (g[i] + mu * v[i] if nesterov else v[i])


@njit(**_OPTIONS)
def _rmsprop(d, g, s, lr, a, rest, eps):
    """``s = a s + (1-a) g^2``; ``d = -lr g / (sqrt(s) + eps)``."""
    for i in range(d.size):
        s[i] = a * s[i] + rest * g[i] * g[i]
        d[i] = -lr * g[i] / (np.sqrt(s[i]) + eps)


@njit(**_OPTIONS)
def _moments(g, m, s, rest1, b2, rest2):
    """First and second moment of Adam, the first as torch's lerp."""
    for i in range(g.size):
        m[i] = m[i] + rest1 * (g[i] - m[i])
        s[i] = b2 * s[i] + rest2 * g[i] * g[i]


@njit(**_OPTIONS)
def _adam(d, m, s, step, root, eps):
    """``d = -step m / (sqrt(s) / root + eps)`` with ``step = lr / (1-b1^t)``, ``root = sqrt(1-b2^t)``."""
    for i in range(d.size):
        d[i] = -step * m[i] / (np.sqrt(s[i]) / root + eps)


@njit(**_OPTIONS)
def _amsgrad(d, m, s, s_max, step, root, eps):
    """Adam with the running maximum of the second moment in the denominator."""
    for i in range(d.size):
        s_max[i] = max(s_max[i], s[i])
        d[i] = -step * m[i] / (np.sqrt(s_max[i]) / root + eps)


@njit(**_OPTIONS)
def _trend(d, trend, beta, rest, by_strength, size, shrink, floor, masked):
    """Shrink the dimensions whose step opposes the trend: by a constant, or by the trend's strength ``r``."""
    span = _ONE - floor
    for i in range(d.size):
        raw = d[i]
        old = trend[i]
        t = beta * old + rest * raw
        judge = old if masked else t
        c = _ONE
        if by_strength:
            a = size[i] if masked else beta * size[i] + rest * abs(raw)
            r = abs(judge) / (a + _TINY)
            if raw * judge < 0:
                c = _ONE - span * r
            step = c * raw
            size[i] = beta * size[i] + rest * abs(step) if masked else a
        else:
            if raw * judge < 0:
                c = shrink
            step = c * raw
        trend[i] = beta * old + rest * step if masked else t
        d[i] = step


@njit(**_OPTIONS)
def _consistency(d, trend, size, beta, rest, floor, masked):
    """Scale every dimension by how consistent its trend is: ``c = floor + (1-floor) |T| / A``."""
    span = _ONE - floor
    for i in range(d.size):
        raw = d[i]
        t = beta * trend[i] + rest * raw
        a = beta * size[i] + rest * abs(raw)
        r = abs(t) / (a + _TINY)
        step = (floor + span * r) * raw
        if masked:
            t = beta * trend[i] + rest * step
            a = beta * size[i] + rest * abs(step)
        trend[i] = t
        size[i] = a
        d[i] = step


@njit(**_OPTIONS)
def _rate(d, trend, rate, beta, rest, floor, up, down, masked):
    """A rate per dimension that shrinks by ``down`` when opposed and recovers by ``up``, within [floor, 1]."""
    for i in range(d.size):
        raw = d[i]
        old = trend[i]
        t = beta * old + rest * raw
        judge = old if masked else t
        if raw * judge < 0:
            c = max(floor, rate[i] * down)
        else:
            c = min(_ONE, rate[i] * up)
        rate[i] = c
        step = c * raw
        trend[i] = beta * old + rest * step if masked else t
        d[i] = step


@njit(**_OPTIONS)
def _base(code, d, g, state, first, lo, hi, h, count):
    """Run the base step ``code`` on one block: gradient ``g`` and base vectors in, step ``d`` out."""
    lr = np.float32(h[0])
    if code == 0:
        for i in range(d.size):
            d[i] = -lr * g[i]
    elif code == 1 or code == 2:
        _momentum(d, g, state[first, lo:hi], lr, np.float32(h[2]), code == 2)
    elif code == 3:
        _rmsprop(d, g, state[first, lo:hi], lr, np.float32(h[3]), np.float32(1 - h[3]), np.float32(h[6]))
    else:
        m = state[first, lo:hi]
        s = state[first + 1, lo:hi]
        _moments(g, m, s, np.float32(1 - h[4]), np.float32(h[5]), np.float32(1 - h[5]))
        step = np.float32(h[0] / (1 - h[4] ** count))
        root = np.float32(np.sqrt(1 - h[5] ** count))
        if code == 6:
            _amsgrad(d, m, s, state[first + 2, lo:hi], step, root, np.float32(h[6]))
        else:
            _adam(d, m, s, step, root, np.float32(h[6]))


@njit(**_OPTIONS)
def _modify(code, d, state, first, lo, hi, h, masked, shrink):
    """Run the modifier ``code`` on one block: shrinks ``d`` in place, updates the trend vectors."""
    beta = np.float32(h[7])
    rest = np.float32(1 - h[7])
    floor = np.float32(h[9])
    trend = state[first, lo:hi]
    if code == 1:
        _trend(d, trend, beta, rest, False, trend, shrink, floor, masked)
    elif code == 2:
        _trend(d, trend, beta, rest, True, state[first + 1, lo:hi], shrink, floor, masked)
    elif code == 3:
        _consistency(d, trend, state[first + 1, lo:hi], beta, rest, floor, masked)
    else:
        _rate(d, trend, state[first + 1, lo:hi], beta, rest, floor, np.float32(h[10]), np.float32(h[11]), masked)


@njit(**_OPTIONS)
def _decayed(out, g, w, decay):
    """``g + decay * w``, the gradient with coupled weight decay."""
    for i in range(out.size):
        out[i] = g[i] + decay * w[i]


@njit(**_OPTIONS)
def _apply(w, d, keep, out):
    """``w = keep w + d``, also into the caller's own copy: push and pull in one store each."""
    for i in range(w.size):
        new = keep * w[i] + d[i]
        w[i] = new
        out[i] = new


@njit(**_OPTIONS)
def _apply_in_place(w, d, keep):
    """``w = keep w + d``, where ``out`` is ``w``: the alias checks of ``_apply`` would choose a scalar loop."""
    for i in range(w.size):
        w[i] = keep * w[i] + d[i]


@njit(**_OPTIONS)
def fused_update(
    state: np.ndarray,
    start: int,
    grad: np.ndarray,
    out: np.ndarray,
    base: int,
    variant: int,
    masked: bool,
    by_staleness: bool,
    vectors: int,
    hyper: np.ndarray,
    count: int,
    tau: int,
) -> None:
    """Apply one gradient to the elements ``[start, start + grad.size)`` of the shared state and read them back.

    Args:
        state: float32 (1 + vectors, n), C order; row 0 is ``w``, then the base's vectors, then the modifier's.
        start: first element.
        grad: float32, contiguous.
        out: float32, the caller's copy of ``w`` for these elements; may be the very elements of row 0.
        base: a value of ``BASES``.
        variant: a value of ``VARIANTS``.
        masked: the trend follows the shrunk steps instead of the base's.
        by_staleness: "opposed" shrinks by ``1 / (1 + tau)`` in place of ``shrink``.
        vectors: how many rows belong to the base.
        hyper: float64, laid out by ``HYPER``.
        count: this update's number for the shard, from 1 (bias correction).
        tau: updates applied to the shard since the caller read it.
    """
    lr, decay = hyper[0], hyper[1]
    decoupled = base == 5
    keep = np.float32(1 - lr * decay) if decoupled else _ONE
    coupled = np.float32(0 if decoupled else decay)
    shrink = np.float32(1 / (1 + tau) if by_staleness else hyper[8])
    in_place = out.ctypes.data == state[0, start:].ctypes.data
    block = PLAIN_BLOCK if base == 0 and variant == 0 else BLOCK
    d_block = np.empty(block, np.float32)
    g_block = np.empty(block, np.float32)
    for at in range(0, grad.size, block):
        end = min(at + block, grad.size)
        lo, hi = start + at, start + end
        w = state[0, lo:hi]
        d = d_block[: end - at]
        g = grad[at:end]
        if coupled != 0:
            g = g_block[: end - at]
            _decayed(g, grad[at:end], w, coupled)
        _base(base, d, g, state, 1, lo, hi, hyper, count)
        if variant != 0:
            _modify(variant, d, state, 1 + vectors, lo, hi, hyper, masked, shrink)
        if in_place:
            _apply_in_place(w, d, keep)
        else:
            _apply(w, d, keep, out[at:end])
