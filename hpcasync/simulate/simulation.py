"""What every mode of the simulation has: workers, gradients, learning rates, losses, evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hpcasync.data import Dataset, Loader, make_partition
from hpcasync.data.partition import check_batch
from hpcasync.errors import UsageError
from hpcasync.modes.flat import check_dtypes, groups_of
from hpcasync.rules import make_rule
from hpcasync.simulate.cluster import StepTimes
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.gradients import Gradient, Gradients
from hpcasync.simulate.guidance import Guidance
from hpcasync.simulate.inside import Inside
from hpcasync.simulate.worker import Phase, Virtual
from hpcasync.store import LocalStore, aligned_zeros, make_layout
from hpcasync.store.layout import SHARD_ELEMENTS

Evaluated = Callable[[float, float, np.ndarray], None]
"""Told ``(epoch, virtual seconds, w)`` when the model is to be evaluated."""
Stepped = Callable[[int, int, float], None]
"""Told ``(epoch, step, loss)`` of every gradient."""


class Place:
    """A virtual worker's place, for the loader."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class Simulation:
    """Base of the modes.

    Args:
        config: what to simulate.
        dataset: open.
        model: as it starts; it is taken over.
        groups: of workers, each with a store of its own.

    Raises:
        UsageError: a model that the stores can't take; a partition that doesn't fit.
    """

    def __init__(self, config: SimulateConfig, dataset: Dataset, model: nn.Module, groups: int) -> None:
        self.config = config
        self.cluster = config.cluster
        self.rule = make_rule(config.rule, config.options)
        _, names, _ = groups_of(model)
        params = list(model.parameters())
        check_dtypes(params, names, [torch.float32], config.mode)
        self.layout = make_layout([p.numel() for p in params], SHARD_ELEMENTS)
        self.nbytes = 4 * sum(self.layout.sizes)
        start = np.zeros(self.layout.total, np.float32)
        for p, first, size in zip(params, self.layout.starts, self.layout.sizes, strict=True):
            start[first : first + size] = p.detach().reshape(-1).numpy()
        workers = config.workers
        samples = dataset.as_torch("train")
        parts = "iid"  # dealt first: the copies of very many workers fit no memory
        if config.partition == "iid":
            check_batch(config.batch, len(samples), workers)
        else:
            parts = make_partition(config.partition, dataset, workers, config.seed, batch=config.batch)  # type: ignore[assignment]
        self.copies = aligned_zeros(workers, self.layout.total)
        self.copies[:] = start
        place = [i * groups // workers for i in range(workers)]
        # In mode sync one worker pushes for all.
        members = [1] if config.mode == "sync" else [place.count(g) for g in range(groups)]
        self.train_size = len(samples)
        batched = not config.naive and workers > 1
        threads = torch.get_num_threads()
        self.gradients = Gradients(model, self.layout, self.copies, samples, batched=batched, threads=threads)
        layout = make_layout(self.gradients.pushed, SHARD_ELEMENTS)
        self.stores = [LocalStore(layout, self.rule, workers=count) for count in members]
        for store in self.stores:
            store.start_state(start)
        self.workers = [
            Virtual(
                i,
                place[i],
                self.stores[place[i]].worker(0 if config.mode == "sync" else i - place.index(place[i])),
                self.copies[i],
                Loader(dataset, Place(i, workers), batch=config.batch, seed=config.seed, partition=parts),
                StepTimes(self.cluster, i, config.seed),
            )
            for i in range(workers)
        ]
        self.steps_per_epoch = len(self.workers[0].loader)
        given = (model, self.layout, self.copies, self.gradients.buffers)
        self.guidance = Guidance(config, dataset, *given) if config.guided else None
        self.inside = Inside(self.rule, self.layout, names)
        if self.guidance is not None:
            self.guidance.scored = self.inside.scores.extend
        self.stores[0].rule.warm_up()
        self.now = 0.0
        self.loss = [0.0, 0.0]  # sum of losses times samples, samples; since the last evaluation
        self.total_samples = 0
        self.evaluated: Evaluated = lambda epoch, seconds, w: None
        self.stepped: Stepped = lambda epoch, step, loss: None
        absent = self.cluster.absent()
        for worker in self.workers:
            worker.phase = Phase.ABSENT if worker.index in absent else Phase.DONE
        self._hypers: dict[float, list[np.ndarray]] = {}

    @property
    def alive(self) -> list[Virtual]:
        """The workers that are there."""
        return [w for w in self.workers if w.phase is not Phase.ABSENT]

    @property
    def updates(self) -> int:
        """Updates of the shared parameters (of all groups)."""
        return sum(w.updates for w in self.workers)

    def run(self) -> None:
        """Simulate all epochs."""
        raise NotImplementedError

    def hypers(self, step: int) -> list[np.ndarray]:
        """What the rule needs for a worker's step number ``step``, per parameter."""
        assert self.rule.lr is not None
        lr = self.rule.lr
        if self.config.schedule == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * step / (self.config.epochs * self.steps_per_epoch)))
        if lr not in self._hypers:
            self._hypers.clear()
            hyper = self.rule.hyper({**self.rule.group_options(), "lr": lr})
            self._hypers[lr] = [hyper] * len(self.gradients.pushed)
        return self._hypers[lr]

    def took(self, worker: Virtual, gradient: Gradient, *, replay: bool = False) -> bool:
        """Count a gradient, of a replay only if it is not finite; returns whether it may be applied."""
        if not replay:
            worker.samples += gradient.samples
            self.total_samples += gradient.samples
            self.loss[0] += gradient.loss * gradient.samples
            self.loss[1] += gradient.samples
            self.stepped(worker.epoch + 1, worker.step + 1, gradient.loss)
        if gradient.finite:
            return True
        worker.skipped += 1
        message = f"worker {worker.index}, step {worker.steps + 1}: NaN or infinity in the gradient"
        if self.config.on_nonfinite == "abort":
            raise FloatingPointError(f"{message} (on_nonfinite='abort')")
        if sum(w.skipped for w in self.workers) == 1:
            warnings.warn(
                f"{message}; the step is skipped. Further ones are counted without a word.", RuntimeWarning, stacklevel=2
            )
        return False

    def meet(self, workers: list[Virtual]) -> None:
        """The end of an epoch, for those who are there."""
        self.now += self.cluster.meeting
        for worker in workers:
            worker.communicate += self.cluster.meeting

    def appear(self, worker: Virtual) -> None:
        """A worker joins: it begins where the slowest of the others is in the data."""
        worker.present_from = self.now
        epoch, step = min((w.epoch, w.step) for w in self.alive or [worker])
        worker.begin_epoch(epoch, min(step, self.steps_per_epoch - 1))
        worker.steps = epoch * self.steps_per_epoch + worker.step  # for schedules of the learning rate

    def vanish(self, worker: Virtual) -> None:
        """A worker dies, and what it was computing with it."""
        worker.present += self.now - worker.present_from
        worker.life += 1
        worker.phase = Phase.ABSENT
        worker.replays = []
        self.gradients.cancel(worker.index)
        if self.guidance is not None:
            self.guidance.forget(worker.index)

    def nobody_left(self) -> UsageError:
        """The error for a machine without workers."""
        return UsageError(f"--fail: no worker is left at {self.now:g} s and none joins later; nothing more can be computed")
