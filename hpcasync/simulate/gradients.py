"""Gradients of virtual workers, each at its own copy of the parameters, several at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcasync.data import Split
from hpcasync.kernels import all_finite
from hpcasync.simulate.ahead import Ahead
from hpcasync.simulate.perceptron import Perceptron
from hpcasync.store import Layout, aligned_zeros

Lane = Literal["naive", "compiled", "threads"]


@dataclass(frozen=True)
class Gradient:
    """One gradient.

    Attributes:
        parts: per parameter of ``Gradients.pushed`` float32 (size,), or None.
        loss: the mean over the batch.
        samples: of the batch.
        finite: whether it holds neither NaN nor infinity.
        buffers: the model's buffers afterwards.
    """

    parts: list[np.ndarray | None]
    loss: float
    samples: int
    finite: bool
    buffers: list[Tensor]


class Gradients:
    """Evaluates gradients, on one thread each, while others are pushed.

    A worker's copy and batch are fixed when it begins to compute (``request``); the gradient is needed when its push
    arrives (``take``). Whatever has been requested may be computed at once, so all CPU threads work, the soonest needed
    first. *compiled*: a perceptron, in one compiled call each; *threads*: any other model, by autograd; *naive*: by autograd,
    one after the other, each when it is needed, on all threads together. All give the same values up to rounding. The bits of
    *compiled* and *threads* do not depend on the number of threads.

    Args:
        model: float32; its parameters are pointed elsewhere.
        layout: where each parameter lies in a copy.
        copies: float32 (workers, layout.total); row i is worker i's copy.
        samples: of the training split.
        batched: False is naive for every model.
        threads: CPU threads.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, copies: np.ndarray, samples: Split, *, batched: bool = True, threads: int = 1
    ) -> None:
        self.model, self.layout, self.copies, self.samples = model, layout, copies, samples
        self._copies = torch.from_numpy(copies)
        self._threads = threads
        self._lane, self.note = _choose(model, samples, batched, threads)
        self.lanes = 1 if self._lane == "naive" else threads
        self._compiled = Perceptron(model, layout.starts, samples, self.lanes) if self._lane == "compiled" else None
        replicas = self.lanes if self._compiled is None else 1
        self._replicas = [model] + [copy.deepcopy(model) for _ in range(replicas - 1)]
        self._params = [list(m.parameters()) for m in self._replicas]
        self._buffers = [list(m.buffers()) for m in self._replicas]
        own = self._buffers[0]
        self.buffers = [[b.clone() for b in own] for _ in range(len(copies))] if own else []
        self._free: list[np.ndarray] = []  # rows for gradients; the last given back, still in the cache, is used first
        self._alone = self._lane == "threads"  # torch computes on one thread
        self._ahead: Ahead[np.ndarray, Gradient] = Ahead(self._one if self._compiled is None else self._row, self.lanes - 1)

    @property
    def lane(self) -> Lane:
        """How gradients are evaluated."""
        return self._lane

    @property
    def pushed(self) -> tuple[int, ...]:
        """Sizes of the parameters as the gradients' ``parts`` have them: a compiled gradient is one, its gaps included."""
        return self.layout.sizes if self._compiled is None else (self.layout.total,)

    def request(self, worker: int, indices: np.ndarray, when: float = 0.0) -> None:
        """Worker ``worker`` begins to compute on the samples ``indices``; its copy stays as it is until ``take``, at ``when``."""
        self._ahead.request(worker, indices, when)

    def cancel(self, worker: int) -> None:
        """Forget what the worker was computing."""
        self._ahead.cancel(worker)

    def take(self, worker: int) -> Gradient:
        """The gradient that ``request`` asked for."""
        if self._alone and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        gradient = self._ahead.take(worker)
        if self.buffers:
            _copy_all(self.buffers[worker], gradient.buffers)
        return gradient

    def release(self, gradient: Gradient) -> None:
        """Say that a gradient's arrays are not needed any more."""
        if self._compiled is not None and gradient.parts[0] is not None:
            self._free.append(gradient.parts[0])

    def average_buffers(self, workers: Sequence[int]) -> None:
        """Give all workers the mean of the buffers of ``workers``; of integer buffers the first's."""
        for j in range(len(self.buffers[0]) if self.buffers else 0):
            mine = [self.buffers[w][j] for w in workers]
            mean = torch.stack(mine).mean(0) if mine[0].is_floating_point() else mine[0].clone()
            for buffers in self.buffers:
                buffers[j].copy_(mean)

    def load(self, w: np.ndarray) -> nn.Module:
        """The model with the parameters ``w`` (a view) and worker 0's buffers, for evaluation."""
        self._point(0, torch.from_numpy(w))
        if self.buffers:
            _copy_all(self._buffers[0], self.buffers[0])
        return self.model

    @contextmanager
    def evaluation(self, w: np.ndarray) -> Iterator[nn.Module]:
        """``load(w)`` with all CPU threads for torch; nothing is computed ahead meanwhile."""
        with self._ahead.pause():
            torch.set_num_threads(self._threads)
            yield self.load(w)

    def close(self) -> None:
        """End the threads."""
        self._ahead.close()
        torch.set_num_threads(self._threads)

    def _row(self, lane: int, worker: int, indices: np.ndarray) -> Gradient:
        """A compiled gradient."""
        assert self._compiled is not None
        try:
            out = self._free.pop()
        except IndexError:
            out = aligned_zeros(1, self.layout.total)[0]
        loss, finite = self._compiled(lane, self.copies[worker], indices, out)
        return Gradient([out], loss, len(indices), finite, [])

    def _one(self, lane: int, worker: int, indices: np.ndarray) -> Gradient:
        """A gradient by autograd."""
        if lane:
            torch.set_num_threads(1)
        model, params, buffers = self._replicas[lane], self._params[lane], self._buffers[lane]
        self._point(lane, self._copies[worker])
        if self.buffers:
            _copy_all(buffers, self.buffers[worker])
        x, y = self.samples.batch(indices)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        parts = [None if p.grad is None else p.grad.reshape(-1).numpy() for p in params]
        finite = all(g is None or all_finite(g) for g in parts)
        return Gradient(parts, loss.item(), len(indices), finite, [b.clone() for b in buffers])

    def _point(self, replica: int, flat: Tensor) -> None:
        """Make the parameters views of one copy."""
        for p, start, size in zip(self._params[replica], self.layout.starts, self.layout.sizes, strict=True):
            p.data = flat[start : start + size].view(p.shape)
            p.grad = None


def _choose(model: nn.Module, samples: Split, batched: bool, threads: int) -> tuple[Lane, str]:
    """How to evaluate the model's gradients, and a note where that is not what was asked for."""
    if not batched:
        return "naive", ""
    if Perceptron.fits(model):
        return "compiled", ""
    before = torch.get_rng_state()
    # Two samples, for batch normalisation; on a copy, whose statistics nobody reads.
    copy.deepcopy(model)(samples.batch(np.arange(2) % len(samples))[0])
    draws = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    if draws:
        return "naive", "the model draws random numbers (dropout): gradients are evaluated one by one"
    if threads == 1:
        return "naive", "the model is no plain perceptron and there is one CPU thread: gradients are evaluated one by one"
    return "threads", ""


def _copy_all(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for t, s in zip(target, source, strict=True):
        t.copy_(s)
