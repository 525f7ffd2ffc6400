"""The gradient of a perceptron in one call: gather, normalise, forward, backward and finite check."""

from __future__ import annotations

import numpy as np
from numba import njit

from hpcasync.kernels.elementwise import all_finite
from hpcasync.kernels.product import WIDTH, product

NONE, RELU, TANH, SIGMOID = 0, 1, 2, 3
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _activate(row, kind, bias):
    """Add the bias and apply the activation, in place. NaN stays NaN."""
    if kind == RELU:
        for i in range(row.size):
            z = row[i] + bias
            row[i] = np.float32(0) if z < 0 else z
        return
    for i in range(row.size):
        z = row[i] + bias
        if kind == TANH:
            z = np.tanh(z)
        elif kind == SIGMOID:
            z = np.float32(1) / (np.float32(1) + np.exp(-z))
        row[i] = z


@njit(**_OPTIONS)
def _chain(d, h, kind):
    """The gradient before an activation, in place, from the one after it and from what it gave."""
    if kind == NONE:
        return
    for i in range(d.size):
        if kind == RELU:
            d[i] = np.float32(0) if h[i] <= 0 else d[i]
        elif kind == TANH:
            d[i] *= np.float32(1) - h[i] * h[i]
        else:
            d[i] *= h[i] * (np.float32(1) - h[i])


@njit(**_OPTIONS)
def _turn(source, target):
    """``target = source'``, in strips of columns that share cache lines."""
    rows, columns = source.shape
    for first in range(0, rows, 16):
        last = min(first + 16, rows)
        for j in range(columns):
            for i in range(first, last):
                target[j, i] = source[i, j]


@njit(**_OPTIONS)
def _loss(logits, d, labels, indices):
    """Mean cross-entropy; writes its gradient by the logits (classes, padded) to ``d``, 0 where no sample is."""
    classes, batch = logits.shape[0], indices.size
    share = np.float32(1) / np.float32(batch)
    total = 0.0
    d[:, batch:] = 0
    for b in range(batch):
        top = logits[0, b]
        for c in range(1, classes):
            top = max(top, logits[c, b])
        norm = np.float32(0)
        for c in range(classes):
            e = np.exp(logits[c, b] - top)
            d[c, b] = e
            norm += e
        label = labels[indices[b]]
        total += np.log(norm) - (logits[label, b] - top)
        for c in range(classes):
            d[c, b] = d[c, b] / norm * share
        d[label, b] -= share
    return total / batch


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum(row):
    total = np.float32(0)
    for value in row:
        total += value
    return total


def scratch_size(widths: np.ndarray, batch: int) -> int:
    """Elements: activations of all levels, the inputs, the rows of a level, and the gradients of two."""
    padded = -(-batch // WIDTH) * WIDTH
    return int(widths.sum() * padded + widths[0] * batch + widths.max() * (batch + 2 * padded))


@njit(**_OPTIONS)
def perceptron_gradient(w, g, x, labels, indices, factor, offset, widths, places, scratch):
    """Write the gradient of the mean cross-entropy at ``w`` to ``g``; returns the loss and whether ``g`` is finite.

    Activations lie transposed, samples side by side and filled up to whole vectors: then one form of product does all.

    Args:
        w: float32 (total,), the parameters.
        g: float32 (total,), its gaps between parameters stay as they are.
        x: uint8 or float32 (N, widths[0]), the samples as stored.
        labels: int64 (N,).
        indices: int64 (batch,), the samples to take.
        factor: float32 (widths[0],), with ``offset`` it normalises a sample.
        offset: float32 (widths[0],).
        widths: int64 (layers + 1,), of the inputs and of each layer's outputs.
        places: int64 (layers, 3), first element of the weight and of the bias (-1: none), and the activation.
        scratch: float32, of ``scratch_size`` elements at least.
    """
    batch, layers = indices.size, len(places)
    padded = -(-batch // WIDTH) * WIDTH
    at = np.zeros(layers + 2, np.int64)  # where the transposed activations of each level begin
    for level in range(layers + 1):
        at[level + 1] = at[level] + widths[level] * padded
    inputs_at = at[layers + 1]
    rows_at = inputs_at + widths[0] * batch
    d_at = rows_at + widths.max() * batch
    e_at = d_at + widths.max() * padded
    inputs = scratch[inputs_at:rows_at].reshape(batch, widths[0])
    for b in range(batch):
        sample = x[indices[b]]
        for j in range(widths[0]):
            inputs[b, j] = np.float32(sample[j]) * factor[j] + offset[j]
    turned = scratch[: at[1]].reshape(widths[0], padded)
    turned[:, batch:] = 0
    _turn(inputs, turned)
    memory, weights, out = scratch.ctypes.data, w.ctypes.data, g.ctypes.data
    for level in range(layers):
        k, m = widths[level], widths[level + 1]
        here, there = memory + 4 * at[level], memory + 4 * at[level + 1]
        product(weights + 4 * places[level, 0], k, 1, here, padded, there, padded, m, padded, k)
        for o in range(m):
            bias = w[places[level, 1] + o] if places[level, 1] >= 0 else np.float32(0)
            start = at[level + 1] + o * padded
            _activate(scratch[start : start + padded], places[level, 2], bias)
    classes = widths[layers]
    logits = scratch[at[layers] : at[layers + 1]].reshape(classes, padded)
    loss = _loss(logits, scratch[d_at : d_at + classes * padded].reshape(classes, padded), labels, indices)
    for level in range(layers - 1, -1, -1):
        k, m = widths[level], widths[level + 1]
        if level < layers - 1:
            _chain(scratch[d_at : d_at + m * padded], scratch[at[level + 1] : at[level + 2]], places[level, 2])
        left = inputs_at
        if level:
            left = rows_at
            hidden = scratch[at[level] : at[level + 1]].reshape(k, padded)
            _turn(hidden[:, :batch], scratch[rows_at : rows_at + batch * k].reshape(batch, k))
        product(memory + 4 * d_at, padded, 1, memory + 4 * left, k, out + 4 * places[level, 0], k, m, k, batch)
        if places[level, 1] >= 0:
            for o in range(m):
                g[places[level, 1] + o] = _sum(scratch[d_at + o * padded : d_at + o * padded + batch])
        if level:
            product(weights + 4 * places[level, 0], 1, k, memory + 4 * d_at, padded, memory + 4 * e_at, padded, k, padded, m)
            d_at, e_at = e_at, d_at
    return loss, all_finite(g)
