"""The event loop: groups of workers, asynchronous inside a group, K-step averages among the groups.

One group that never averages is mode async. Groups of one worker are mode kstep.
"""

from __future__ import annotations

import heapq

import numpy as np
from torch import nn

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.modes.block import BLOCK_KEYS, BlockOptions
from hpcasync.modes.interval import interval_at, parse_every
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.delay import Delay
from hpcasync.simulate.overlap import Overlap
from hpcasync.simulate.polling import noticed
from hpcasync.simulate.simulation import Simulation
from hpcasync.simulate.worker import Phase, Virtual
from hpcasync.store import IDLE

# Of events at the same time, who comes and goes first; then by worker.
_CHANGE, _ARRIVE, _PATIENCE, _CALLED, _SUMMED = 0, 1, 2, 3, 4


class Asynchronous(Simulation):
    """Modes async, kstep and hierarchical.

    A worker reads at time t and computes at what it read for a drawn time; its push travels, queues for the shards and is
    applied at its arrival, in order of arrival (ties by worker). Applying and reading are one, as in the live store, so
    what comes back is of the moment of the push.
    """

    def __init__(self, config: SimulateConfig, dataset: Dataset, model: nn.Module) -> None:
        groups = {"async": 1, "kstep": config.workers, "hierarchical": config.groups}[config.mode]
        super().__init__(config, dataset, model, groups)
        self._averaging = config.mode != "async"
        # A worker of kstep is alone with its store: what a local step costs is in its step time.
        alone = config.mode == "kstep"
        self._transfer = 0.0 if alone else self.cluster.network.transfer(self.nbytes)
        self._service = 0.0 if alone else 4 * self.layout.total / self.cluster.service
        self._free = [np.zeros(len(self.layout.shards)) for _ in self.stores]
        if self._averaging and self.rule.own_copy:
            raise UsageError(f"rule {self.rule.name!r} ties asynchronous workers to a shared centre; use mode async")
        if config.delay and self.rule.own_copy:
            raise UsageError(f"--delay: rule {self.rule.name!r} computes at copies that are the workers' own")
        artificial = config.delay and config.mode == "async"
        self._delay = Delay(self.stores[0], config.delay, config.seed) if artificial else None
        self._overlap = Overlap(config.delay, self._block) if config.delay and not artificial else None
        given = config.staleness
        self._bound = None if alone else self.rule.default_staleness if given is None else given
        self._discard = getattr(self.rule, "out_of_turn", "hold") == "discard"
        self._patience = float(getattr(self.rule, "patience", np.inf))
        self._every = parse_every(config.every)
        self._options = BlockOptions(**{k: getattr(config, k) for k in BLOCK_KEYS})
        self._held: list[Virtual] = []
        self._events: list[tuple[float, int, int, int, bool]] = []
        total = self.layout.total
        self._anchor = self.stores[0].state[0].copy()
        self._velocity, self._sum = np.zeros(total, np.float32), np.zeros(total, np.float32)
        self._recorded = self.cluster.recording is not None and not alone
        self._since = 0  # pushes since the last average
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
            elif kind == _SUMMED:
                self._end_overlapped(worker)
                self._read_on(worker, self.now)
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
        worker.sending, back = self._messages(worker)
        worker.communicate += back
        when = start + back + worker.computing + worker.sending
        heapq.heappush(self._events, (when, _ARRIVE, worker.index, worker.life, False))
        self.gradients.request(worker.index, worker.replays[0] if worker.replays else worker.batches[worker.step], when)

    def _messages(self, worker: Virtual) -> tuple[float, float]:
        """Seconds that the push will travel and that what was read has travelled; as recorded, waits with it, where they were."""
        if self._recorded:
            return worker.times.communicate + worker.times.wait, 0.0
        return self._transfer_at(worker, 0), self._transfer_at(worker, -1)

    def _transfer_at(self, worker: Virtual, ahead: int) -> float:
        """Seconds of a message after the worker's present step, or after the last (-1): own copies meet the centre rarely."""
        step = worker.view.steps + ahead
        return self._transfer if step < 0 or step % self.rule.every == 0 else 0.0

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
        done = self._serve(worker)
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
        self._since += 1
        if self.guidance is not None:
            worker.replays = self.guidance.after(worker.index, worker.steps, worker.batches[worker.step - 1])
        self._evaluate_between()

    def _reread(self, worker: Virtual) -> None:
        """Read the newest parameters, unless the worker's copy is its own."""
        if not self.rule.own_copy:
            self.stores[worker.group].pull(worker.view, worker.out)

    def _next(self, worker: Virtual, done: float) -> None:
        warm = worker.steps <= self.config.warm_start
        due = self._averaging and (warm or worker.since >= interval_at(self._every, worker.steps - worker.since))
        if worker.step == len(worker.batches) and not worker.replays:
            if not self.config.free_running:
                if due and not warm and self._overlap is not None:
                    self._begin_overlapped(worker)
                self._wait_as(worker, Phase.DONE)
                return
            worker.begin_epoch(worker.epoch + 1)
        if self._overlap is not None and self._waits_for_sum(worker):
            return
        if due and (warm or self._overlap is None):
            self._wait_as(worker, Phase.BLOCK)
            return
        if due:
            self._begin_overlapped(worker)
        self._read_on(worker, done)

    def _read_on(self, worker: Virtual, done: float) -> None:
        """Read, unless the worker is too far ahead."""
        if self._ahead(worker):
            worker.phase = Phase.GATED
            worker.gated = self.now
        else:
            self._read(worker, done)

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
            self._end_overlapped(worker)
            return False
        worker.phase = Phase.SUM
        if overlap.ends(worker.group):
            self._await_sum(worker)
        return True

    def _begin_overlapped(self, worker: Virtual) -> None:
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
        heapq.heappush(self._events, (when, _SUMMED, worker.index, worker.life, False))

    def _end_overlapped(self, worker: Virtual) -> None:
        assert self._overlap is not None
        self._overlap.end(worker.group, self.stores[worker.group].state[0])
        self._reread(worker)

    def _wait_as(self, worker: Virtual, phase: Phase) -> None:
        """Wait for all; meanwhile nobody waits for this worker."""
        worker.phase = phase
        self._clocks(worker, IDLE)

    def _serve(self, worker: Virtual) -> float:
        """When the store is done with the worker's push: one push at a time in each shard, the others queue.

        A push works on one shard after the other and takes free ones first, so as many pushes as there are shards
        go on side by side.
        """
        if self._service == 0 or worker.view.steps % self.rule.every:
            return self.now
        free = self._free[worker.group]
        slot = int(free.argmin())
        free[slot] = max(self.now, float(free[slot])) + self._service
        worker.communicate += self._service
        return float(free[slot])

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
        if self._overlap is not None and self.alive:
            self._sum_up()

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
        if any(w.phase is Phase.BLOCK for w in alive):
            self._end_averages(alive)
            self._average(alive, plain=all(w.steps <= self.config.warm_start for w in alive))
            self._resume([w for w in alive if w.phase is Phase.BLOCK])
            return True
        return self._end_epoch(alive)

    def _admit(self) -> bool:
        """Push the first held gradient whose turn it is."""
        for worker in self._held:
            if not worker.called and self._turn(worker):
                if self._recorded and worker.refused is not None:  # a live rank does not see it at once
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
            late = noticed(self.now - worker.gated) if self._recorded else 0.0
            self._read(worker, max(self.now, worker.gated + late))
        return bool(free)

    def _impatient(self, worker: Virtual, when: float) -> bool:
        """Whether the held gradient is still the one whose patience ends now."""
        return worker.refused is not None and worker.refused + self._patience <= when

    def _end_epoch(self, alive: list[Virtual]) -> bool:
        """All have done their share: one model, evaluation, and the next epoch."""
        self._end_averages(alive)
        if self._averaging and self._since:
            self._average(alive, plain=False)
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

    def _end_averages(self, alive: list[Virtual]) -> None:
        """All wait: put in what is still under way."""
        if self._overlap is None:
            return
        for group in sorted({w.group for w in alive}):
            if self._overlap.ends(group):
                self.now = max(self.now, self._overlap.ready)
                self._overlap.end(group, self.stores[group].state[0])
        self._overlap.drop()

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
