"""Mode sync: all workers compute at the same parameters, and their mean gradient is applied once."""

from __future__ import annotations

import numpy as np
from torch import nn

from hpcasync.data import Dataset
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.gradients import Gradient
from hpcasync.simulate.guidance import Guidance
from hpcasync.simulate.simulation import Simulation
from hpcasync.simulate.worker import Phase, Virtual


class Synchronous(Simulation):
    """A step lasts until the slowest worker is done, plus one ring allreduce.

    A worker that dies while it computes takes no part in the step; the mean is that of the others. One that joins does
    so at the next step.
    """

    def __init__(self, config: SimulateConfig, dataset: Dataset, model: nn.Module) -> None:
        super().__init__(config, dataset, model, 1)
        self._changes = list(self.cluster.changes)

    @property
    def updates(self) -> int:
        """Steps that changed the model."""
        return max(w.updates for w in self.workers)

    def run(self) -> None:
        for epoch in range(self.config.epochs):
            for worker in self.alive:
                worker.begin_epoch(epoch)
            while any(w.step < self.steps_per_epoch for w in self.alive) or not self.alive:
                self._step()
            self.gradients.average_buffers([w.index for w in self.alive])
            self.meet(self.alive)
            if (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs:
                self.evaluated(epoch + 1, self.now, self.stores[0].state[0])

    def _step(self) -> None:
        self._change(self.now)
        alive = self.alive
        if not alive:
            later = [when for when, _, joins in self._changes if joins]
            if not later:
                raise self.nobody_left()
            self.now = min(later)
            return
        for worker in alive:
            worker.phase = Phase.BUSY
            worker.computing = worker.times.next()
            self.gradients.request(worker.index, worker.batches[worker.step])
        start = self.now
        for when, index, joins in list(self._changes):
            worker = self.workers[index]
            if not joins and worker.phase is not Phase.ABSENT and when < start + worker.computing:
                self.now = when
                self.vanish(worker)
                self._changes.remove((when, index, joins))
        alive = [w for w in alive if w.phase is not Phase.ABSENT]
        if not alive:
            return
        exchange = self.cluster.network.allreduce(self.nbytes, len(alive))
        for worker in alive:
            worker.compute += worker.computing
            worker.communicate += exchange
        self.now = start + max(w.computing for w in alive) + exchange
        gradients = [self.gradients.take(w.index) for w in alive]
        good = [self.took(w, g) for w, g in zip(alive, gradients, strict=True)]
        if all(good):
            self._apply(alive, gradients)
        for worker in alive:
            worker.steps += 1
            worker.step += 1
        if self.guidance is not None:
            self._replay(alive, self.guidance)

    def _replay(self, alive: list[Virtual], guidance: Guidance) -> None:
        """Score; then all make as many replays as the worker that has most, those with fewer contribute zero."""
        batches = [w.batches[w.step - 1] for w in alive]
        chosen = guidance.after_all([w.index for w in alive], alive[0].steps, batches)
        exchange = self.cluster.network.allreduce(self.nbytes, len(alive))
        for turn in range(max(map(len, chosen))):
            busy = [(w, own[turn]) for w, own in zip(alive, chosen, strict=True) if turn < len(own)]
            for worker, batch in busy:
                worker.computing = worker.times.next()
                worker.compute += worker.computing
                self.gradients.request(worker.index, batch)
            for worker in alive:
                worker.communicate += exchange
            self.now += max(w.computing for w, _ in busy) + exchange
            gradients = [self.gradients.take(w.index) for w, _ in busy]
            if all([self.took(w, g, replay=True) for (w, _), g in zip(busy, gradients, strict=True)]):
                self._apply(alive, gradients, replay=True)
            guidance.gradients += len(busy)
            guidance.replays += 1

    def _apply(self, alive: list[Virtual], gradients: list[Gradient], *, replay: bool = False) -> None:
        """One push of the mean over ``alive``; a worker without a gradient counts as zero."""
        parts: list[np.ndarray | None] = []
        for given in zip(*(g.parts for g in gradients), strict=True):
            there = [g for g in given if g is not None]
            total = there[0].copy() if there else None
            for g in there[1:]:
                total += g
            parts.append(None if total is None else np.divide(total, np.float32(len(alive)), out=total))
        first = self.workers[0]
        hypers = self.hypers(alive[0].steps - replay)
        if not replay and first.step + 1 == len(first.batches):
            self.inside.last_push(self.stores[0], first, parts, hypers)
        # The same view each time, so that nothing is ever stale.
        self.stores[0].push_pull(first.view, parts, first.out, hypers)
        first.view.staleness.counts[:] = 0
        self.copies[:] = self.stores[0].state[0]
        for gradient in gradients:
            self.gradients.release(gradient)
        for worker in alive:
            worker.updates += 1

    def _change(self, now: float) -> None:
        """Who has come or gone since the last step."""
        while self._changes and self._changes[0][0] <= now:
            _, index, joins = self._changes.pop(0)
            worker = self.workers[index]
            if joins:
                self.appear(worker)
                worker.phase = Phase.DONE
                self.copies[index] = self.stores[0].state[0]
            elif worker.phase is not Phase.ABSENT:
                self.vanish(worker)
