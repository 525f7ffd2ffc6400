"""Modes kstep and hierarchical: groups that are asynchronous inside, and K-step averages among the groups."""

from __future__ import annotations

import heapq

import numpy as np
from torch import nn

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.modes.block import BLOCK_KEYS, BlockOptions
from hpcasync.simulate.asynchronous import SUMMED, Asynchronous
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.overlap import Overlap
from hpcasync.simulate.worker import Phase, Virtual


class Averaged(Asynchronous):
    """Groups of one worker are mode kstep.

    All wait for an average, or (``--delay``) compute on while it goes.
    """

    def __init__(self, config: SimulateConfig, dataset: Dataset, model: nn.Module) -> None:
        super().__init__(config, dataset, model, config.workers if config.mode == "kstep" else config.groups)
        if self.rule.own_copy:
            raise UsageError(f"rule {self.rule.name!r} ties asynchronous workers to a shared centre; use mode async")
        self._options = BlockOptions(**{k: getattr(config, k) for k in BLOCK_KEYS})
        self._overlap = Overlap(config.delay, self._block) if config.delay else None
        total = self.layout.total
        self._anchor = self.stores[0].state[0].copy()
        self._velocity, self._sum = np.zeros(total, np.float32), np.zeros(total, np.float32)
        self._since = 0  # pushes since the last average

    def _count(self, worker: Virtual) -> None:
        self._since += not worker.replays
        super()._count(worker)

    def _next(self, worker: Virtual, done: float) -> None:
        warm, due = self._options.warm(worker.steps), self._options.due(worker.steps, worker.since)
        if worker.at_end:
            if due and not warm and self._overlap is not None:
                self._begin(worker)
            super()._next(worker, done)
        elif self._overlap is not None and self._waits_for_sum(worker):
            return
        elif due and (warm or self._overlap is None):
            self._wait_as(worker, Phase.BLOCK)
        else:
            if due:
                self._begin(worker)
            self._read_on(worker, done)

    def _fail(self, worker: Virtual) -> None:
        super()._fail(worker)
        if self._overlap is not None and self.alive:
            self._sum_up()

    def _meet(self, alive: list[Virtual]) -> bool:
        self._end_all(alive)
        waiting = [w for w in alive if w.phase is Phase.BLOCK]
        if waiting:
            self._average(alive, plain=all(self._options.warm(w.steps) for w in alive))
            self._resume(waiting)
            return True
        if self._since:
            self._average(alive, plain=False)
        return super()._meet(alive)

    # Averages for which all wait.

    def _block(self, total: np.ndarray, count: int, plain: bool = False) -> None:
        """The block step from the sum of ``count`` models, in place."""
        self._options.apply(total, self._anchor, self._velocity, count, plain=plain)
        if self._options.moving:
            self.inside.velocity = self._velocity

    def _average(self, alive: list[Virtual], *, plain: bool) -> None:
        """Average the models of the groups that have workers, with block momentum; all read the result."""
        groups = sorted({w.group for w in alive})
        stores = [self.stores[g] for g in groups]
        seconds = self.cluster.network.allreduce(self.nbytes, len(groups))
        self.now += seconds
        self._since = 0
        np.copyto(self._sum, stores[0].state[0])
        for store in stores[1:]:
            self._sum += store.state[0]
        self._block(self._sum, len(groups), plain)
        for store in self.stores:
            store.state[0] = self._sum
            if self.config.inner_state == "reset":
                for row, vector in enumerate(self.rule.vectors, start=1):
                    store.state[row] = vector.start
                store.versions[:] = 0
        if self.config.inner_state == "average" and len(self.rule.vectors):
            mean = np.mean([store.state[1:] for store in stores], axis=0, dtype=np.float32)
            for store in self.stores:
                store.state[1:] = mean
        for worker in self.workers:
            self.stores[worker.group].pull(worker.view, worker.out)
            worker.since = 0
        for worker in alive:
            worker.communicate += seconds

    # Averages while all compute.

    def _leads(self, worker: Virtual) -> bool:
        return worker.index == min(w.index for w in self.alive if w.group == worker.group)

    def _waits_for_sum(self, worker: Virtual) -> bool:
        """Whether the first worker of a group has to wait for the sum, D steps after it was begun; else it is put in."""
        overlap = self._overlap
        assert overlap is not None
        if worker.since < overlap.delay or not overlap.under_way(worker.group) or not self._leads(worker):
            return False
        if overlap.ends(worker.group) and overlap.ready <= self.now:
            self._end(worker)
            return False
        worker.phase = Phase.SUM
        if overlap.ends(worker.group):
            self._await_sum(worker)
        return True

    def _begin(self, worker: Virtual) -> None:
        worker.since = 0
        if self._leads(worker):
            assert self._overlap is not None
            self._overlap.begin(worker.group, self.stores[worker.group].state[0])
            self._sum_up()

    def _sum_up(self) -> None:
        """Make the sum if all groups with workers have sent; those that wait for it go on when it is there."""
        assert self._overlap is not None
        groups = sorted({w.group for w in self.alive})
        if self._overlap.complete(groups, self.now, self.cluster.network.allreduce(self.nbytes, len(groups))):
            for worker in self.alive:
                if worker.phase is Phase.SUM:
                    self._await_sum(worker)

    def _await_sum(self, worker: Virtual) -> None:
        assert self._overlap is not None
        worker.communicate += max(0.0, self._overlap.ready - self.now)
        when = max(self.now, self._overlap.ready)
        heapq.heappush(self._events, (when, SUMMED, worker.index, worker.life, False))

    def _end(self, worker: Virtual) -> None:
        assert self._overlap is not None
        self._overlap.end(worker.group, self.stores[worker.group].state[0])
        self._reread(worker)

    def _end_all(self, alive: list[Virtual]) -> None:
        """All wait: put in what is still under way."""
        if self._overlap is None:
            return
        for group in sorted({w.group for w in alive}):
            if self._overlap.ends(group):
                self.now = max(self.now, self._overlap.ready)
                self._overlap.end(group, self.stores[group].state[0])
        self._overlap.drop()

    def _summed(self, worker: Virtual) -> None:
        self._end(worker)
        self._read_on(worker, self.now)
