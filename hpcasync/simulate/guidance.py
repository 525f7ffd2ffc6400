"""Guided SGD of virtual workers: what each remembers, how it scores, what is to be replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcasync.data import Dataset, verification_batch
from hpcasync.modes.batch_memory import BatchMemory
from hpcasync.simulate.config import SimulateConfig
from hpcasync.store import Layout

Indices = np.ndarray


class Guidance:
    """The memories of all workers, scored with forward passes at each worker's own copy; the modes make the replays.

    Args:
        config: with ``rho``, ``verification`` and ``seed``.
        dataset: open; verification samples are of its training split.
        model: what is evaluated, by a copy of its own, so that gradients may be computed meanwhile.
        layout: where each parameter lies in a worker's copy.
        copies: float32 (workers, layout.total); row i is worker i's copy.
        buffers: each worker's, or none.

    Attributes:
        evaluations: forward passes of all workers, for verification and scores.
        gradients: gradients of all workers for replays.
        replays: updates that were replays; in mode sync shared by all workers.
        scored: told the final scores, ``psi``, of a worker's remembered batches before the best are replayed.

    Raises:
        UsageError: ``rho`` below 2, more verification samples than training data.
    """

    def __init__(
        self,
        config: SimulateConfig,
        dataset: Dataset,
        model: nn.Module,
        layout: Layout,
        copies: np.ndarray,
        buffers: Sequence[Sequence[Tensor]],
    ) -> None:
        self.rho = config.rho
        self.evaluations = self.gradients = self.replays = 0
        self.scored: Callable[[Sequence[float]], None] = lambda scores: None
        self._memories: list[BatchMemory[Indices]] = [BatchMemory(config.rho) for _ in range(config.workers)]
        self._model = copy.deepcopy(model).eval()
        self._params = list(zip(self._model.parameters(), layout.starts, layout.sizes, strict=True))
        self._copies, self._buffers = torch.from_numpy(copies), buffers
        self._samples = dataset.as_torch("train")
        self._verification = verification_batch(dataset, config.verification, config.seed)

    def after(self, worker: int, step: int, batch: Indices) -> list[Indices]:
        """An asynchronous worker has pushed ``batch`` in its step number ``step``; returns what it is to replay now."""
        return self.after_all([worker], step, [batch])[0]

    def after_all(self, workers: Sequence[int], step: int, batches: Sequence[Indices]) -> list[list[Indices]]:
        """The same for the workers of a synchronous step: they agree on the mean of their verification losses."""
        memories = [self._memories[w] for w in workers]
        for memory, batch in zip(memories, batches, strict=True):
            memory.add(step, batch)
        older = [memory.older for memory in memories]
        self.evaluations += sum(1 + len(own) for own in older)
        found = self._losses(workers, older)
        agreed = sum(verification for verification, _ in found) / len(found)
        for memory, (_, losses) in zip(memories, found, strict=True):
            memory.score(agreed, losses)
            if memory.full:
                self.scored(memory.scores)
        return [[batch for _, batch in memory.take()] if memory.full else [] for memory in memories]

    def forget(self, worker: int) -> None:
        """The worker has died, and what it remembered with it."""
        self._memories[worker] = BatchMemory(self.rho)

    def record(self) -> dict[str, int]:
        """What guidance cost, as a live run counts it."""
        costs = {"evaluations": self.evaluations, "gradients": self.gradients, "replays": self.replays}
        return {"rho": self.rho, **costs}

    def _losses(self, workers: Sequence[int], older: Sequence[list[Indices]]) -> list[tuple[float, list[float]]]:
        """Per worker the verification loss and those of its older batches."""
        if len(workers) > 1 and not self._buffers:  # a synchronous step: the copies are equal
            verification, losses = self._forward(workers[0], [batch for own in older for batch in own])
            shares = iter(losses)
            return [(verification, [next(shares) for _ in own]) for own in older]
        return [self._forward(worker, own) for worker, own in zip(workers, older, strict=True)]

    @torch.no_grad()
    def _forward(self, worker: int, batches: list[Indices]) -> tuple[float, list[float]]:
        """Mean losses on the verification batch and on ``batches``, by one pass over all samples."""
        x, y = self._verification
        sizes = [len(y), *(len(b) for b in batches)]
        if batches:
            more = self._samples.batch(np.concatenate(batches))
            x, y = torch.cat([x, more[0]]), torch.cat([y, more[1]])
        for p, start, size in self._params:
            p.data = self._copies[worker, start : start + size].view(p.shape)
        if self._buffers:
            for mine, theirs in zip(self._model.buffers(), self._buffers[worker], strict=True):
                mine.copy_(theirs)
        each = F.cross_entropy(self._model(x), y, reduction="none").double().numpy()
        starts = np.cumsum([0, *sizes[:-1]])
        means = (np.add.reduceat(each, starts) / sizes).tolist()
        return means[0], means[1:]
