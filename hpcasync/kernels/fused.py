"""The fused push+pull pass: effective gradient, base step, trend modifier and write-out over one piece of a shard.

A pass walks the piece in blocks that fit the first-level cache and runs up to four short stages on each block:
effective gradient (``hpcasync.kernels.gradient``), base step (the step ``d`` that the base optimizer would take), modifier
(shrinks ``d``), apply. Each stage is defined once; any gradient stage combines with any base and any modifier. Memory is
read and written once, as in a hand-fused loop, because the intermediate ``d`` never leaves the cache; each stage touches at
most five arrays, few enough for LLVM to vectorise it with run-time alias checks.

Strict IEEE arithmetic (no fastmath, no contraction): the result of an element does not depend on where a shard or a
block begins, so any sharding gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hpcasync.kernels.codes import GRADIENTS, HYPER, PLAN
from hpcasync.kernels.gradient import effective_gradient, gather

BLOCK, PLAIN_BLOCK = 512, 1536
"""Elements, measured from 128 to 16384: short, so that the processor's prefetch goes on from one block to the next (6-20 %
at 25 M elements); longer for plain sgd, where the 80 ns that a block costs show on data in the cache."""

_BASE, _VARIANT, _MASKED, _VECTORS = PLAN["base"], PLAN["variant"], PLAN["masked"], PLAN["vectors"]
_GRADIENT, _WINDOW, _BOXED, _OWN_COPY = PLAN["gradient"], PLAN["window"], PLAN["boxed"], PLAN["own_copy"]
_UNCORRECTED, _GUARDED = PLAN["uncorrected"], PLAN["guarded"]
_GROUPS = GRADIENTS["groups"]
_LOW, _HIGH, _MOVING_RATE = HYPER["low"], HYPER["high"], HYPER["moving_rate"]
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
def _ema(d, g, v, lr, mu, rest):
    """``v = mu v + (1-mu) g``; ``d = -lr v``."""
    for i in range(d.size):
        v[i] = mu * v[i] + rest * g[i]
        d[i] = -lr * v[i]


@njit(**_OPTIONS)
def _rmsprop(d, g, s, lr, a, rest, eps):
    """``s = a s + (1-a) g^2``; ``d = -lr g / (sqrt(s) + eps)``."""
    for i in range(d.size):
        s[i] = a * s[i] + rest * g[i] * g[i]
        d[i] = -lr * g[i] / (np.sqrt(s[i]) + eps)


@njit(**_OPTIONS)
def _adagrad(d, g, s, lr, eps):
    """``s = s + g^2``; ``d = -lr g / (sqrt(s) + eps)``."""
    for i in range(d.size):
        s[i] = s[i] + g[i] * g[i]
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
def _amsgrad_guarded(d, m, s, s_max, step, root, eps):
    """The same with no step where the denominator is 0: with ``eps`` 0 it is so until the first gradient."""
    for i in range(d.size):
        s_max[i] = max(s_max[i], s[i])
        below = np.sqrt(s_max[i]) / root + eps
        d[i] = -step * m[i] / below if below > 0 else np.float32(0)


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
def _base(plan, d, g, rows, first, lo, hi, h, count):
    """Run the base step on one block: gradient ``g`` and base vectors (``rows`` from ``first`` on) in, step ``d`` out."""
    code = plan[_BASE]
    lr = np.float32(h[0])
    if code == 0:
        for i in range(d.size):
            d[i] = -lr * g[i]
    elif code == 1 or code == 2:
        _momentum(d, g, rows[first, lo:hi], lr, np.float32(h[2]), code == 2)
    elif code == 3:
        _rmsprop(d, g, rows[first, lo:hi], lr, np.float32(h[3]), np.float32(1 - h[3]), np.float32(h[6]))
    elif code == 7:
        _ema(d, g, rows[first, lo:hi], lr, np.float32(h[2]), np.float32(1 - h[2]))
    elif code == 8:
        _adagrad(d, g, rows[first, lo:hi], lr, np.float32(h[6]))
    else:
        m = rows[first, lo:hi]
        s = rows[first + 1, lo:hi]
        _moments(g, m, s, np.float32(1 - h[4]), np.float32(h[5]), np.float32(1 - h[5]))
        if plan[_UNCORRECTED] != 0:
            step, root = lr, _ONE
        else:
            step = np.float32(h[0] / (1 - h[4] ** count))
            root = np.float32(np.sqrt(1 - h[5] ** count))
        if code != 6:
            _adam(d, m, s, step, root, np.float32(h[6]))
        elif plan[_GUARDED] != 0:
            _amsgrad_guarded(d, m, s, rows[first + 2, lo:hi], step, root, np.float32(h[6]))
        else:
            _amsgrad(d, m, s, rows[first + 2, lo:hi], step, root, np.float32(h[6]))


@njit(**_OPTIONS)
def _modify(code, d, state, first, lo, hi, h, masked, shrink):
    """Run the modifier ``code`` on one block: shrinks ``d`` in place, updates the trend vectors."""
    beta = np.float32(h[7])
    rest = np.float32(1 - h[7])
    floor = np.float32(h[9])
    trend = state[first, lo:hi]
    if code == 1 or code == 2:
        size = trend if code == 1 else state[first + 1, lo:hi]
        _trend(d, trend, beta, rest, code == 2, size, shrink, floor, masked)
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
def _clip(w, low, high):
    """Project onto the box [low, high]."""
    for i in range(w.size):
        w[i] = min(max(w[i], low), high)


@njit(**_OPTIONS)
def _elastic(w, own, rate):
    """``e = rate (own - w); w += e; own -= e``: the worker's copy and the centre draw each other."""
    for i in range(w.size):
        e = rate * (own[i] - w[i])
        w[i] += e
        own[i] -= e


@njit(**_OPTIONS)
def _own_copy_update(state, start, grad, out, private, plan, hyper, count, arrival):
    """The base step on the caller's own copy ``out``, with its own vectors; if ``arrival``, first an exchange with ``w``."""
    decoupled = plan[_BASE] == 5
    keep = np.float32(1 - hyper[0] * hyper[1]) if decoupled else _ONE
    coupled = np.float32(0 if decoupled else hyper[1])
    d_block = np.empty(BLOCK, np.float32)
    g_block = np.empty(BLOCK, np.float32)
    for at in range(0, grad.size, BLOCK):
        end = min(at + BLOCK, grad.size)
        lo, hi = start + at, start + end
        own, d, g = out[at:end], d_block[: end - at], grad[at:end]
        if arrival != 0:
            _elastic(state[0, lo:hi], own, np.float32(hyper[_MOVING_RATE]))
        if coupled != 0:
            g = g_block[: end - at]
            _decayed(g, grad[at:end], own, coupled)
        _base(plan, d, g, private, 0, lo, hi, hyper, count)
        _apply_in_place(own, d, keep)


@njit(**_OPTIONS)
def fused_update(
    state: np.ndarray,
    start: int,
    grad: np.ndarray,
    out: np.ndarray,
    private: np.ndarray,
    plan: np.ndarray,
    hyper: np.ndarray,
    count: int,
    tau: int,
    arrival: int,
) -> None:
    """Apply one gradient to the elements ``[start, start + grad.size)`` of the shared state and read them back.

    Args:
        state: float32 (1 + vectors, n), C order; row 0 is ``w``, then the base's vectors, then those of the modifier or of
            the gradient stage.
        start: first element.
        grad: float32, contiguous.
        out: float32, the caller's copy of ``w`` for these elements, on entry what ``grad`` was taken at; may be the very
            elements of row 0.
        private: float32 (rows, n), the caller's own vectors; no rows for most rules.
        plan: int64, laid out by ``PLAN``.
        hyper: float64, laid out by ``HYPER``.
        count: this update's number for the shard, from 1 (bias correction).
        tau: updates applied to the shard since the caller read it.
        arrival: number of gradients in the mean ("sum", "round", "groups"); with ``own_copy`` whether to exchange with ``w``.
    """
    if plan[_OWN_COPY] != 0:
        _own_copy_update(state, start, grad, out, private, plan, hyper, count, arrival)
        return
    base, variant, gradient = plan[_BASE], plan[_VARIANT], plan[_GRADIENT]
    if gradient == _GROUPS:
        end = start + grad.size
        if arrival < plan[_WINDOW]:
            gather(grad, state[1 + plan[_VECTORS], start:end], np.float32(arrival), state[0, start:end], out)
            return
        count = (count + plan[_WINDOW] - 1) // plan[_WINDOW]  # of the steps: one per group
    vectors, masked, boxed = plan[_VECTORS], plan[_MASKED] != 0, plan[_BOXED] != 0
    lr, decay = hyper[0], hyper[1]
    decoupled = base == 5
    keep = np.float32(1 - lr * decay) if decoupled else _ONE
    coupled = np.float32(0 if decoupled else decay)
    shrink = np.float32(1 / (1 + tau) if hyper[8] < 0 else hyper[8])
    in_place = out.ctypes.data == state[0, start:].ctypes.data
    block = PLAIN_BLOCK if base == 0 and variant == 0 and gradient == 0 else BLOCK
    d_block = np.empty(block, np.float32)
    g_block = np.empty(block, np.float32)
    e_block = np.empty(block if gradient != 0 else 0, np.float32)
    for at in range(0, grad.size, block):
        end = min(at + block, grad.size)
        lo, hi = start + at, start + end
        w = state[0, lo:hi]
        d = d_block[: end - at]
        g = grad[at:end]
        if gradient != 0:
            g = e_block[: end - at]
            effective_gradient(
                gradient, g, grad[at:end], w, out[at:end], state, 1 + vectors, private, lo, hi,
                hyper, plan[_WINDOW], count, arrival,
            )  # fmt: skip
        if coupled != 0:
            raw = g
            g = g_block[: end - at]
            _decayed(g, raw, w, coupled)
        _base(plan, d, g, state, 1, lo, hi, hyper, count)
        if variant != 0:
            _modify(variant, d, state, 1 + vectors, lo, hi, hyper, masked, shrink)
        if in_place:
            _apply_in_place(w, d, keep)
        else:
            _apply(w, d, keep, out[at:end])
        if boxed:
            _clip(w, np.float32(hyper[_LOW]), np.float32(hyper[_HIGH]))
            if not in_place:
                _clip(out[at:end], np.float32(hyper[_LOW]), np.float32(hyper[_HIGH]))
