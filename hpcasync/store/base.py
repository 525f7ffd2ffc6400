"""The store: shared parameters in shards, and the push+pull that every worker runs on them.

A worker pushes by applying the rule itself, in place, under the shard's lock, and reads the new parameters in the same
pass. There is no server. Subclasses say where the state lies and what a lock is; what a push does stands here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.comm.signs import LOCK
from hpcasync.rules import Rule
from hpcasync.rules.base import NO_VECTORS
from hpcasync.store.clocks import Clocks
from hpcasync.store.layout import Layout, Shard
from hpcasync.store.worker import Worker

NOTES = 4
"""int64 words per shard that are the rule's to write."""


class Store(Clocks):
    """Shared parameters and rule state, cut into shards.

    Args:
        layout: where each parameter lies.
        rule: what a gradient does, bound to the number of workers.
        workers: number of workers that push.
        state: float32 (1 + vectors, layout.total), row 0 is ``w``.
        versions: int64 (shards,), updates applied to each shard.
        writers: int64 (shards,), the last worker that wrote each shard, -1 before.
        clocks, excused: see ``Clocks``.
        notes: int64 (shards, NOTES), the rule's own counts per shard.
        threads: threads that work on a shard together.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Rule,
        *,
        workers: int,
        state: np.ndarray,
        versions: np.ndarray,
        writers: np.ndarray,
        clocks: np.ndarray,
        excused: np.ndarray,
        notes: np.ndarray,
        threads: int = 1,
    ) -> None:
        self.layout = layout
        super().__init__(rule, clocks, excused)
        self.workers = workers
        self.state = state
        self.versions = versions
        self.writers = writers
        self.notes = notes
        self._threads = threads

    # What a subclass defines.

    def try_lock(self, shard: int, worker: int) -> bool:
        """Take the shard's lock if it is free."""
        raise NotImplementedError

    def unlock(self, shard: int, worker: int) -> None:
        """Give the lock back; everything written under it is visible to the next holder."""
        raise NotImplementedError

    def barrier(self) -> None:
        """All workers meet here and see each other's work. Collective where the store is shared."""

    # What every worker does.

    def worker(self, index: int) -> Worker:
        """A view of the store for worker ``index``, which has read nothing yet."""
        worker = Worker(index, len(self.layout.shards), self.workers)
        self.restart(worker)
        return worker

    def start_state(self, w: np.ndarray) -> None:
        """Set ``w`` and the rule's vectors to their start, all versions to 0. Nobody may push meanwhile.

        A worker that has pushed before needs a ``restart``.
        """
        self.state[0] = w
        for row, vector in enumerate(self.rule.vectors, start=1):
            self.state[row] = vector.start
        self.versions[:] = 0
        self.writers[:] = -1
        self.notes[:] = 0

    def publish(self, w: np.ndarray, *, keep_state: bool = False) -> None:
        """Make the first worker's ``w`` the shared one, the rule's vectors and the versions as at the start. Collective.

        Args:
            w: float32 (layout.total,); only the first worker's counts.
            keep_state: leave vectors and versions as they are.
        """
        if keep_state:
            self.state[0] = w
        else:
            self.start_state(w)

    def install(self, state: np.ndarray | None, versions: Sequence[int], notes: np.ndarray | None = None) -> None:
        """Set everything that is shared, as ``snapshot``, ``shard_versions`` and ``shard_notes`` gave it. Collective.

        Args:
            state: float32 (1 + vectors, layout.total); only the first worker's counts, the others may give None.
            versions: of the shards, the same on all; of another sharding: the largest stands for all, since all shards
                have had nearly the same number of updates.
            notes: of the shards, the same on all; None for none yet.
        """
        assert state is not None
        self.state[:] = state
        self.notes[:] = 0 if notes is None else notes
        self.writers[:] = -1
        self.versions[:] = self._own_versions(versions)

    def _own_versions(self, versions: Sequence[int]) -> Sequence[int]:
        shards = len(self.layout.shards)
        return versions if len(versions) == shards else [max(versions)] * shards

    def shard_versions(self) -> list[int]:
        """Updates applied to each shard."""
        return list(map(int, self.versions))

    def shard_notes(self) -> np.ndarray:
        """The rule's counts of each shard, int64 (shards, NOTES): a copy. Nobody may push meanwhile."""
        return np.array(self.notes)

    def own_vectors(self, worker: Worker) -> np.ndarray:
        """The worker's own vectors, float32 (private vectors of the rule, layout.total), wherever they lie; to be read only."""
        return worker.private

    def set_own_vectors(self, worker: Worker, values: np.ndarray) -> None:
        """Set the worker's own vectors, as ``own_vectors`` gave them."""
        worker.private[:] = values

    def restart(self, worker: Worker) -> None:
        """Set a worker's own vectors to their start, as if it had never pushed."""
        vectors = self.rule.private_vectors
        worker.private = np.empty((len(vectors), self.layout.total), np.float32) if vectors else NO_VECTORS
        for row, vector in enumerate(vectors):
            worker.private[row] = vector.start
        worker.pushed[:] = False
        worker.steps = 0

    def forget_the_dead(self, worker: Worker, *, shared: bool) -> None:
        """Begin anew with shared vectors that mean nothing without the workers' own ones, since some of those are gone.

        Every worker that is left calls it for itself; nobody may push meanwhile.

        Args:
            worker: whose own vectors begin anew with them.
            shared: whether this worker, one of them, sees to the shared ones too.
        """
        rows = [row for row, vector in enumerate(self.rule.vectors, start=1) if not vector.saved]
        if not rows or not self.rule.private_vectors:
            return
        steps = worker.steps
        self.restart(worker)
        worker.steps = steps
        if shared:
            for row in rows:
                self.state[row] = self.rule.vectors[row - 1].start
            self.notes[:] = 0

    def push_pull(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        """Apply a gradient and read the new parameters, shard by shard; each shard is one atomic update.

        With a rule of ``own_copy`` it is a step of the worker's own copy ``out``, which touches the shared parameters only
        in every ``rule.every``-th call. With a rule ``in_turn`` it must be the worker's turn, see ``may_push``.

        Args:
            worker: who pushes.
            grads: per parameter float32 (size,), or None: that parameter is left as it is, only read.
            out: float32 (layout.total,), the worker's own copy of ``w``: on entry what it last read.
            hypers: per parameter what ``rule.hyper`` gave for its group.
        """
        if worker.steps % self.rule.every:
            self._step_alone(worker, grads, out, hypers)
        else:
            self._push_shards(worker, grads, out, hypers)
        worker.steps += 1
        self.tick(worker)

    def _push_shards(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        taus = np.full(len(self.layout.shards), -1, np.int64)
        clock = int(self.clocks[worker.index])

        def apply(k: int, shard: Shard) -> None:
            taus[k] = self._push_shard(worker, k, shard, grads, out, hypers, clock)

        self._over_shards(worker, apply)
        for tau in taus.tolist():
            if tau >= 0:
                worker.staleness.add(tau)

    def _push_shard(
        self,
        worker: Worker,
        k: int,
        shard: Shard,
        grads: Sequence[np.ndarray | None],
        out: np.ndarray,
        hypers: Sequence[np.ndarray],
        clock: int,
    ) -> int:
        """Update one shard, under its lock; returns its staleness, -1 if it was only read."""
        rule, keeps = self.rule, self.rule.own_copy
        version, read = int(self.versions[k]), int(worker.read[k])
        if not any([grads[p.param] is not None for p in shard.pieces]):
            if not keeps:
                np.copyto(out[shard.start : shard.stop], self.state[0, shard.start : shard.stop])
            worker.read[k] = version
            return -1
        tau = version - read
        arrival = rule.arrive(self.notes[k], not worker.pushed[k], clock)
        count = worker.steps + 1 if keeps else version + 1
        for p in shard.pieces:
            part = out[p.start : p.start + p.size]
            grad = grads[p.param]
            if grad is None:
                if not keeps:
                    np.copyto(part, self.state[0, p.start : p.start + p.size])
            else:
                rule.update(
                    self.state,
                    p.start,
                    grad[p.offset : p.offset + p.size],
                    part,
                    hypers[p.param],
                    count,
                    tau,
                    threads=self._threads,
                    private=worker.private,
                    arrival=arrival,
                )
        worker.pushed[k] = True
        self.versions[k] = worker.read[k] = version + 1
        self.writers[k] = worker.index
        if worker.observer is not None:
            worker.observer(k, read, version + 1)
        return tau

    def _step_alone(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        """A step of the worker's own copy: nothing shared is read or written, so no lock, version or staleness."""
        threads, private = self._threads, worker.private
        for start, size, grad, hyper in zip(self.layout.starts, self.layout.sizes, grads, hypers, strict=True):
            if grad is not None:
                part = out[start : start + size]
                count = worker.steps + 1
                self.rule.update(self.state, start, grad, part, hyper, count, 0, threads=threads, private=private, arrival=0)

    def pull(self, worker: Worker, out: np.ndarray) -> None:
        """Read all shared parameters into ``out``; each shard is of one version.

        With a rule of ``own_copy`` this replaces the worker's own copy by the centre.
        """

        def copy(k: int, shard: Shard) -> None:
            np.copyto(out[shard.start : shard.stop], self.state[0, shard.start : shard.stop])
            worker.read[k] = self.versions[k]

        self._over_shards(worker, copy)

    def add(self, worker: Worker, delta: np.ndarray) -> None:
        """Add ``delta``, float32 (layout.total,), to the shared parameters, shard by shard; it is no update of the rule."""

        def move(k: int, shard: Shard) -> None:
            self.state[0, shard.start : shard.stop] += delta[shard.start : shard.stop]

        self._over_shards(worker, move)

    def snapshot(self, worker: Worker) -> np.ndarray:
        """A copy of ``state``, each shard of one version."""
        copy = np.empty_like(self.state)

        def take(k: int, shard: Shard) -> None:
            copy[:, shard.start : shard.stop] = self.state[:, shard.start : shard.stop]

        self._over_shards(worker, take)
        return copy

    def _over_shards(self, worker: Worker, work: Callable[[int, Shard], None]) -> None:
        """Run ``work`` under the lock of every shard, each once, taking free shards first; a lock-free rule takes none."""
        count = len(self.layout.shards)
        todo = deque((worker.first + i) % count for i in range(count))
        if self.rule.lock_free:
            for k in todo:
                work(k, self.layout.shards[k])
            return
        backoff = Backoff()
        misses = 0
        while todo:
            k = todo.popleft()
            if self.try_lock(k, worker.index):
                worker.goes_on()
                try:
                    work(k, self.layout.shards[k])
                finally:
                    self.unlock(k, worker.index)
                misses = 0
                continue
            todo.append(k)
            misses += 1
            if misses >= len(todo):  # every shard left is held by somebody else
                worker.waits(LOCK)
                worker.waited += backoff.pause()
                misses = 0

    def holders(self) -> list[int]:
        """The workers that hold a shard's lock just now, where that can be told."""
        return []

    def close(self) -> None:
        """Give back what the store holds. Idempotent; collective where the store is shared."""
