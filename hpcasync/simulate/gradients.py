"""Gradients of virtual workers: each at its own copy of the parameters, those in flight together in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcasync.data import Split
from hpcasync.simulate.stacked import StackedMLP
from hpcasync.store import Layout

Lane = Literal["naive", "stacked", "threads"]


@dataclass(frozen=True)
class Gradient:
    """One gradient: per parameter float32 (size,) or None, the mean loss, and the samples behind it."""

    parts: list[np.ndarray | None]
    loss: float
    samples: int


class Gradients:
    """Evaluates gradients as late as possible, and then all at once whose copy and batch are known.

    A worker's copy and batch are fixed when it begins to compute (``request``); the gradient is needed when its push
    arrives (``take``). In between, others have begun: the first that is needed takes all of them along. *stacked*
    evaluates a perceptron's in batched matrix products; *threads* evaluates any other model's side by side, each on one
    thread of its own; *naive* evaluates each when it is needed. All give the same values up to rounding; each is
    bit-identical for a seed.

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
        self._waiting: dict[int, np.ndarray] = {}  # worker: the samples of its batch
        self._ready: dict[int, Gradient] = {}
        self.calls = self.evaluated = 0
        self._lane, self.note = _choose(model, samples, batched, threads)
        self._stacked = StackedMLP(model, layout.starts) if self._lane == "stacked" else None
        replicas = threads if self._lane == "threads" else 1
        self._replicas = [model] + [copy.deepcopy(model) for _ in range(replicas - 1)]
        self._params = [list(m.parameters()) for m in self._replicas]
        self._buffers = [list(m.buffers()) for m in self._replicas]
        own = self._buffers[0]
        self.buffers = [[b.clone() for b in own] for _ in range(len(copies))] if own else []
        self._pool = ThreadPoolExecutor(replicas) if replicas > 1 else None

    @property
    def lane(self) -> Lane:
        """How gradients are evaluated."""
        return self._lane

    def request(self, worker: int, indices: np.ndarray) -> None:
        """Worker ``worker`` begins to compute on the samples ``indices``; its copy stays as it is until ``take``."""
        self._waiting[worker] = indices

    def cancel(self, worker: int) -> None:
        """Forget what the worker was computing."""
        self._waiting.pop(worker, None)
        self._ready.pop(worker, None)

    def take(self, worker: int) -> Gradient:
        """The gradient that ``request`` asked for."""
        if worker not in self._ready:
            todo = [worker] if self._lane == "naive" else sorted(self._waiting)
            self.calls += 1
            self.evaluated += len(todo)
            batches = [self._waiting.pop(w) for w in todo]
            self._ready.update(zip(todo, self._evaluate(todo, batches), strict=True))
        return self._ready.pop(worker)

    def average_buffers(self, workers: Sequence[int]) -> None:
        """Give all workers the mean of the buffers of ``workers``; of integer buffers the first's."""
        for j in range(len(self.buffers[0]) if self.buffers else 0):
            mine = [self.buffers[w][j] for w in workers]
            mean = torch.stack(mine).mean(0) if mine[0].is_floating_point() else mine[0].clone()
            for buffers in self.buffers:
                buffers[j].copy_(mean)

    def load(self, w: np.ndarray, worker: int = 0) -> nn.Module:
        """The model with the parameters ``w`` (a view) and the worker's buffers, for evaluation."""
        self._point(0, torch.from_numpy(w))
        if self.buffers:
            _copy_all(self._buffers[0], self.buffers[worker])
        return self.model

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _evaluate(self, workers: list[int], batches: list[np.ndarray]) -> list[Gradient]:
        if self._stacked is not None and len(workers) > 1:
            return self._evaluate_stacked(workers, batches)
        if self._pool is None or len(workers) == 1:
            return [self._one(0, w, b) for w, b in zip(workers, batches, strict=True)]
        torch.set_num_threads(1)  # MKL keeps one number for all threads
        try:
            lanes = range(len(self._replicas))
            jobs = [self._pool.submit(self._share, k, workers[k :: len(lanes)], batches[k :: len(lanes)]) for k in lanes]
            shares = [job.result() for job in jobs]
        finally:
            torch.set_num_threads(self._threads)
        return [shares[i % len(lanes)][i // len(lanes)] for i in range(len(workers))]

    def _share(self, replica: int, workers: list[int], batches: list[np.ndarray]) -> list[Gradient]:
        torch.set_num_threads(1)
        return [self._one(replica, w, b) for w, b in zip(workers, batches, strict=True)]

    def _one(self, replica: int, worker: int, indices: np.ndarray) -> Gradient:
        model, params = self._replicas[replica], self._params[replica]
        self._point(replica, self._copies[worker])
        if self.buffers:
            _copy_all(self._buffers[replica], self.buffers[worker])
        x, y = self.samples.batch(indices)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if self.buffers:
            _copy_all(self.buffers[worker], self._buffers[replica])
        parts = [None if p.grad is None else p.grad.reshape(-1).numpy() for p in params]
        return Gradient(parts, loss.item(), len(indices))

    def _evaluate_stacked(self, workers: list[int], batches: list[np.ndarray]) -> list[Gradient]:
        assert self._stacked is not None
        sizes = np.array([len(b) for b in batches])
        longest = int(sizes.max())
        if sizes.min() < longest:  # filled up with samples of weight 0
            batches = [np.append(b, np.repeat(b[:1], longest - len(b))) for b in batches]
        weight = (np.arange(longest) < sizes[:, None]) / sizes[:, None]
        x, y = self.samples.batch(np.concatenate(batches))
        copies = self._copies if len(workers) == len(self._copies) else self._copies[workers]
        shape = (len(workers), longest)
        grads, losses = self._stacked(copies, x.view(*shape, -1), y.view(shape), torch.from_numpy(weight).float())
        arrays = [g.numpy() for g in grads]
        return [
            Gradient([a[i] for a in arrays], loss, size)
            for i, (loss, size) in enumerate(zip(losses.tolist(), sizes.tolist(), strict=True))
        ]

    def _point(self, replica: int, flat: Tensor) -> None:
        """Make the parameters views of one copy."""
        for p, start, size in zip(self._params[replica], self.layout.starts, self.layout.sizes, strict=True):
            p.data = flat[start : start + size].view(p.shape)
            p.grad = None


def _choose(model: nn.Module, samples: Split, batched: bool, threads: int) -> tuple[Lane, str]:
    """How to evaluate the model's gradients, and a note where that is not what was asked for."""
    if not batched:
        return "naive", ""
    if StackedMLP.fits(model):
        return "stacked", ""
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
