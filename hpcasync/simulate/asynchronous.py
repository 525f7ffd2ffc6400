"""The event loop: groups of workers, asynchronous inside a group. One group is mode async; several: averaged.py."""

from __future__ import annotations

import heapq

import numpy as np
from torch import nn

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.delay import Delay
from hpcasync.simulate.polling import noticed
from hpcasync.simulate.simulation import Simulation
from hpcasync.simulate.wire import Wire
from hpcasync.simulate.worker import Phase, Virtual
from hpcasync.store import IDLE

# Of events at the same time, who comes and goes first; then by worker.
_CHANGE, _ARRIVE, _PATIENCE, _CALLED, SUMMED = 0, 1, 2, 3, 4


class Asynchronous(Simulation):
    """Mode async.

    A worker reads at time t and computes at what it read for a drawn time; its push travels, queues for the shards and is
    applied at its arrival, in order of arrival (ties by worker). Applying and reading are one, as in the live store, so
    what comes back is of the moment of the push.
    """

    def __init__(self, config: SimulateConfig, dataset: Dataset, model: nn.Module, groups: int = 1) -> None:
        super().__init__(config, dataset, model, groups)
        artificial = config.delay and config.mode == "async"
        if artificial and self.rule.own_copy:
            raise UsageError(f"--delay: rule {self.rule.name!r} computes at copies that are the workers' own")
        self._delay = Delay(self.stores[0], config.delay, config.seed) if artificial else None
        # A worker of kstep is alone with its store: what a local step costs is in its step time.
        alone = config.mode == "kstep"
        self._wire = Wire(config, self.rule, self.layout, groups, alone=alone)
        given = config.staleness
        self._bound = None if alone else self.rule.default_staleness if given is None else given
        self._discard = getattr(self.rule, "out_of_turn", "hold") == "discard"
        self._patience = float(getattr(self.rule, "patience", np.inf))
        self._held: list[Virtual] = []
        self._events: list[tuple[float, int, int, int, bool]] = []
        self._pushes = 0
        self._budget = config.epochs * self.steps_per_epoch * config.workers if config.free_running else -1

    def run(self) -> None:
        for when, index, joins in self.cluster.changes:
            heapq.heappush(self._events, (when, _CHANGE, index, 0, joins))
        for worker in self.workers:
            self.stores[worker.group].pull(worker.view, worker.out)
            if worker.phase is Phase.ABSENT:
                self._clocks(worker, IDLE)
        self._begin_epoch(0)
        while True:
            if not self._events:
                if not self.alive:
                    raise self.nobody_left()
                return
            when, kind, index, life, joins = heapq.heappop(self._events)
            worker = self.workers[index]
            if kind != _CHANGE and life != worker.life:
                continue
            if kind == _PATIENCE and (worker not in self._held or not self._impatient(worker, when)):
                continue
            self.now = max(self.now, when)
            if kind == _ARRIVE:
                self._arrive(worker)
            elif kind == _PATIENCE:
                pass  # _settle finds that its turn has come
            elif kind == _CALLED:
                self._enter(worker)
            elif kind == SUMMED:
                self._summed(worker)
            elif joins:
                self._join(worker)
            else:
                self._fail(worker)
            if not self._settle(reads=kind == _ARRIVE and worker.phase is Phase.BUSY):
                return

    # One worker's way.

    def _read(self, worker: Virtual, start: float) -> None:
        """The copy is what the worker computes with from ``start`` on: its next push is determined."""
        worker.phase = Phase.BUSY
        if self._delay is not None:
            self._delay.age(worker.view, worker.out)
        worker.computing = worker.times.next()
        worker.sending, back = self._wire.messages(worker)
        worker.communicate += back
        when = start + back + worker.computing + worker.sending
        heapq.heappush(self._events, (when, _ARRIVE, worker.index, worker.life, False))
        self.gradients.request(worker.index, worker.replays[0] if worker.replays else worker.batches[worker.step], when)

    def _arrive(self, worker: Virtual) -> None:
        worker.compute += worker.computing
        worker.communicate += worker.sending
        if self._turn(worker):
            worker.refused = None
            self._push(worker)
        elif self._discard:
            self._drop(worker)
        else:
            worker.phase = Phase.HELD
            worker.view.held += 1
            self._held.append(worker)
            heapq.heappush(self._events, (self.now + self._patience, _PATIENCE, worker.index, worker.life, False))

    def _turn(self, worker: Virtual) -> bool:
        """Whether the rule lets the worker push now; after ``patience`` seconds the round turns without the slower ones."""
        store = self.stores[worker.group]
        if store.may_push(worker.view):
            return True
        if worker.refused is None:
            worker.refused = self.now
        if self.now - worker.refused < self._patience:
            return False
        store.excuse(worker.view)
        return True

    def _drop(self, worker: Virtual) -> None:
        """Throw a gradient away that came out of turn."""
        gradient = self.gradients.take(worker.index)
        self.took(worker, gradient, replay=bool(worker.replays))
        self.gradients.release(gradient)
        worker.discarded += 1
        self._reread(worker)
        self._count(worker)
        self._next(worker, self.now)

    def _push(self, worker: Virtual) -> None:
        """Apply the worker's gradient; it goes on, or waits for what it must wait for."""
        store = self.stores[worker.group]
        gradient = self.gradients.take(worker.index)
        replay = bool(worker.replays)
        hypers = self.hypers(worker.steps - replay)  # a replay belongs to the step before it
        done = self._wire.serve(worker, self.now)
        if self.took(worker, gradient, replay=replay):
            if not replay and self._last_before_evaluation(worker):
                self.inside.last_push(store, worker, gradient.parts, hypers)
            store.push_pull(worker.view, gradient.parts, worker.out, hypers)
            worker.updates += 1
            if self._delay is not None:
                self._delay.keep()
        else:
            self._reread(worker)
            i = worker.view.index
            if store.clocks[i] != IDLE:
                store.clocks[i] += 1
        self.gradients.release(gradient)
        self._count(worker)
        self._next(worker, done)

    def _count(self, worker: Virtual) -> None:
        if worker.replays:
            assert self.guidance is not None
            self.guidance.gradients += 1
            self.guidance.replays += 1
            worker.replays.pop(0)
            return
        worker.steps += 1
        worker.step += 1
        worker.since += 1
        self._pushes += 1
        if self.guidance is not None:
            worker.replays = self.guidance.after(worker.index, worker.steps, worker.batches[worker.step - 1])
        self._evaluate_between()

    def _reread(self, worker: Virtual) -> None:
        """Read the newest parameters, unless the worker's copy is its own."""
        if not self.rule.own_copy:
            self.stores[worker.group].pull(worker.view, worker.out)

    def _next(self, worker: Virtual, done: float) -> None:
        """After a push that the store is ``done`` with."""
        if worker.at_end:
            if not self.config.free_running:
                self._wait_as(worker, Phase.DONE)
                return
            worker.begin_epoch(worker.epoch + 1)
        self._read_on(worker, done)

    def _read_on(self, worker: Virtual, done: float) -> None:
        """Read, unless the worker is too far ahead."""
        if self._ahead(worker):
            worker.phase = Phase.GATED
            worker.gated = self.now
        else:
            self._read(worker, done)

    def _summed(self, worker: Virtual) -> None:
        """The sum is there that the worker waited for."""
        raise NotImplementedError("one group has nothing to sum")

    def _wait_as(self, worker: Virtual, phase: Phase) -> None:
        """Wait for all; meanwhile nobody waits for this worker."""
        worker.phase = phase
        self._clocks(worker, IDLE)

    def _ahead(self, worker: Virtual) -> bool:
        clocks = self.stores[worker.group].clocks
        mine = int(clocks[worker.view.index])
        return self._bound is not None and mine != IDLE and mine - int(clocks.min()) > self._bound

    def _clocks(self, worker: Virtual, value: int) -> None:
        self.stores[worker.group].clocks[worker.view.index] = value

    # Who comes and goes.

    def _join(self, worker: Virtual) -> None:
        self.appear(worker)
        store = self.stores[worker.group]
        store.pull(worker.view, worker.out)
        clocks = store.clocks[store.clocks != IDLE]
        self._clocks(worker, int(clocks.min()) if clocks.size else 0)
        worker.since = 0
        self._read(worker, self.now)

    def _fail(self, worker: Virtual) -> None:
        self.vanish(worker)
        self._clocks(worker, IDLE)
        worker.refused = None
        worker.called = False
        if worker in self._held:
            self._held.remove(worker)

    # What others wait for.

    def _settle(self, *, reads: bool) -> bool:
        """Let go on whoever may; returns whether the simulation does."""
        if reads and not self._held and self._bound is None and self._budget < 0:
            return True  # nobody waits for a push, and not all wait for each other
        progress = True
        while progress:
            if 0 <= self._budget <= self._pushes:
                return False
            progress = self._admit() or self._release()
        alive = self.alive
        if not alive:
            if not any(joins for _, kind, _, _, joins in self._events if kind == _CHANGE):
                raise self.nobody_left()
            return True
        if any(w.phase not in (Phase.BLOCK, Phase.DONE) for w in alive):
            return True
        return self._meet(alive)

    def _admit(self) -> bool:
        """Push the first held gradient whose turn it is."""
        for worker in self._held:
            if not worker.called and self._turn(worker):
                if self._wire.recorded and worker.refused is not None:  # a live rank does not see it at once
                    worker.called = True
                    when = worker.refused + noticed(self.now - worker.refused)
                    heapq.heappush(self._events, (when, _CALLED, worker.index, worker.life, False))
                    continue
                self._enter(worker)
                return True
        return False

    def _enter(self, worker: Virtual) -> None:
        """Push what was held."""
        worker.refused = None
        worker.called = False
        self._held.remove(worker)
        self._push(worker)

    def _release(self) -> bool:
        """Let the workers read that are no longer too far ahead."""
        free = [w for w in self.workers if w.phase is Phase.GATED and not self._ahead(w)] if self._bound is not None else []
        for worker in free:
            self._reread(worker)
            late = noticed(self.now - worker.gated) if self._wire.recorded else 0.0
            self._read(worker, max(self.now, worker.gated + late))
        return bool(free)

    def _impatient(self, worker: Virtual, when: float) -> bool:
        """Whether the held gradient is still the one whose patience ends now."""
        return worker.refused is not None and worker.refused + self._patience <= when

    def _meet(self, alive: list[Virtual]) -> bool:
        """All that are there wait for each other; returns whether the simulation goes on."""
        return self._end_epoch(alive)

    def _end_epoch(self, alive: list[Virtual]) -> bool:
        """All have done their share: one model, evaluation, and the next epoch."""
        for worker in alive:
            self.stores[worker.group].pull(worker.view, worker.out)
        self.gradients.average_buffers([w.index for w in alive])
        self.meet(alive)
        epoch = alive[0].epoch + 1
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            self._evaluate(epoch)
        if epoch == self.config.epochs:
            return False
        self._begin_epoch(epoch)
        return True

    def _begin_epoch(self, epoch: int) -> None:
        alive = self.alive
        for worker in alive:
            worker.begin_epoch(epoch)
            worker.since = 0
        self._resume(alive)

    def _resume(self, workers: list[Virtual]) -> None:
        """Go on together: the clocks are equal again, as after a live ``synchronize``."""
        for group, store in enumerate(self.stores):
            most = max(w.steps for w in self.workers if w.group == group)
            for worker in workers:
                if worker.group == group:
                    store.clocks[worker.view.index] = most
                    store.excused[worker.view.index] = 0
        for worker in workers:
            self._read(worker, self.now)

    def _last_before_evaluation(self, worker: Virtual) -> bool:
        """Whether the push that the first worker is about to make is its last before an evaluation, or nearly so."""
        every = self.config.eval_updates
        if worker.index or every is None:
            return worker.index == 0 and worker.step + 1 == len(worker.batches)
        return every - self._pushes % every <= self.config.workers

    def _evaluate_between(self) -> None:
        """Evaluate where no meeting of the workers does it."""
        every, epoch = self.config.eval_updates, self.steps_per_epoch * self.config.workers
        if self._budget >= 0 and self._pushes % epoch == 0:
            number = self._pushes // epoch
            if number % self.config.eval_every == 0 or self._pushes == self._budget:
                self._evaluate(number)
        elif every is not None and self._pushes % every == 0:
            self._evaluate(self.total_samples / self.train_size)

    def _evaluate(self, epoch: float) -> None:
        w = self.stores[0].state[0]
        if len(self.stores) > 1:
            w = np.mean([s.state[0] for s in self.stores], axis=0, dtype=np.float32)
        self.evaluated(epoch, self.now, w)
