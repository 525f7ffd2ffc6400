"""The store: shared parameters in shards, and the push+pull that every worker runs on them.

A worker pushes by applying the rule itself, in place, under the shard's lock, and reads the new parameters in the same
pass. There is no server. Subclasses say where the state lies and what a lock is; the order of a push, versions, staleness
and its bound are the same everywhere and stand here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.rules import Rule
from hpcasync.stats import Staleness
from hpcasync.store.layout import Layout, Shard

IDLE = np.iinfo(np.int64).max
"""Clock of a worker that the others need not wait for."""

Observer = Callable[[int, int, int], None]
"""Told ``(shard, version read, version written)`` of every push, under the shard's lock: records and replay hang here."""


class Worker:
    """One worker's view of a store: what it has read, and its own counts.

    Attributes:
        index: the worker's number, 0 .. workers-1.
        read: int64 (shards,), the version of each shard that this worker last read.
        staleness: histogram over all pushes of shards.
        waited: seconds spent waiting for locks and for slower workers.
    """

    def __init__(self, index: int, shards: int, workers: int) -> None:
        self.index = index
        self.read = np.zeros(shards, np.int64)
        self.staleness = Staleness()
        self.waited = 0.0
        self.observer: Observer | None = None
        # Workers begin at different shards, so that they do not queue behind each other.
        self.first = index * shards // workers


class StalledCallback(Protocol):
    """Told how long a worker has waited, and for which slower workers."""

    def __call__(self, seconds: float, slow: list[int]) -> None: ...


class Store:
    """Shared parameters and rule state, cut into shards.

    Args:
        layout: where each parameter lies.
        rule: what a gradient does.
        workers: number of workers that push.
        state: float32 (1 + vectors, layout.total), row 0 is ``w``.
        versions: int64 (shards,), updates applied to each shard.
        writers: int64 (shards,), the last worker that wrote each shard, -1 before.
        clocks: int64 (workers,), pushes of each worker, ``IDLE`` for one that nobody needs to wait for.
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
        threads: int = 1,
    ) -> None:
        self.layout = layout
        self.rule = rule
        self.workers = workers
        self.state = state
        self.versions = versions
        self.writers = writers
        self.clocks = clocks
        self._threads = threads

    # What a subclass defines.

    def try_lock(self, shard: int, worker: int) -> bool:
        """Take the shard's lock if it is free."""
        raise NotImplementedError

    def unlock(self, shard: int, worker: int) -> None:
        """Give the lock back; everything written under it is visible to the next holder."""
        raise NotImplementedError

    # What every worker does.

    def worker(self, index: int) -> Worker:
        """A view of the store for worker ``index``, which has read nothing yet."""
        return Worker(index, len(self.layout.shards), self.workers)

    def start_state(self, w: np.ndarray) -> None:
        """Set ``w`` and the rule's vectors to their start, all versions to 0. Nobody may push meanwhile."""
        self.state[0] = w
        for row, vector in enumerate(self.rule.vectors, start=1):
            self.state[row] = vector.start
        self.versions[:] = 0
        self.writers[:] = -1

    def push_pull(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        """Apply a gradient and read the new parameters, shard by shard; each shard is one atomic update.

        Args:
            worker: who pushes.
            grads: per parameter float32 (size,), or None: that parameter is left as it is, only read.
            out: float32 (layout.total,), the worker's own copy of ``w``: on entry what it last read.
            hypers: per parameter what ``rule.hyper`` gave for its group.
        """

        taus = np.full(len(self.layout.shards), -1, np.int64)

        def apply(k: int, shard: Shard) -> None:
            version, read = int(self.versions[k]), int(worker.read[k])
            if not any([grads[p.param] is not None for p in shard.pieces]):
                np.copyto(out[shard.start : shard.stop], self.state[0, shard.start : shard.stop])
                worker.read[k] = version
                return
            tau = version - read
            for p in shard.pieces:
                part = out[p.start : p.start + p.size]
                grad = grads[p.param]
                if grad is None:
                    np.copyto(part, self.state[0, p.start : p.start + p.size])
                else:
                    piece = grad[p.offset : p.offset + p.size]
                    self.rule.update(
                        self.state, p.start, piece, part, hypers[p.param], version + 1, tau, threads=self._threads
                    )
            self.versions[k] = worker.read[k] = version + 1
            self.writers[k] = worker.index
            taus[k] = tau
            if worker.observer is not None:
                worker.observer(k, read, version + 1)

        self._over_shards(worker, apply)
        for tau in taus.tolist():
            if tau >= 0:
                worker.staleness.add(tau)
        if self.clocks[worker.index] != IDLE:
            self.clocks[worker.index] += 1

    def pull(self, worker: Worker, out: np.ndarray) -> None:
        """Read all parameters into ``out``; each shard is of one version."""

        def copy(k: int, shard: Shard) -> None:
            np.copyto(out[shard.start : shard.stop], self.state[0, shard.start : shard.stop])
            worker.read[k] = self.versions[k]

        self._over_shards(worker, copy)

    def _over_shards(self, worker: Worker, work: Callable[[int, Shard], None]) -> None:
        """Run ``work`` under the lock of every shard, each once, taking free shards first."""
        count = len(self.layout.shards)
        todo = deque((worker.first + i) % count for i in range(count))
        backoff = Backoff()
        misses = 0
        while todo:
            k = todo.popleft()
            if self.try_lock(k, worker.index):
                try:
                    work(k, self.layout.shards[k])
                finally:
                    self.unlock(k, worker.index)
                misses = 0
                continue
            todo.append(k)
            misses += 1
            if misses >= len(todo):  # every shard left is held by somebody else
                worker.waited += backoff.pause()
                misses = 0

    # Bounded staleness.

    def gate(
        self, worker: Worker, bound: int, stalled: StalledCallback | None = None, every: float = 30.0
    ) -> bool:
        """Wait while this worker is more than ``bound`` pushes ahead of the slowest (stale synchronous parallel).

        Args:
            worker: who asks.
            bound: pushes; 0 keeps all workers in step.
            stalled: called every ``every`` seconds of waiting.

        Returns:
            Whether it had to wait: then others have pushed since, and a pull brings their work.
        """
        if self._ahead(worker) <= bound:
            return False
        began = last = time.perf_counter()
        backoff = Backoff()
        while self._ahead(worker) > bound:
            worker.waited += backoff.pause()
            now = time.perf_counter()
            if stalled is not None and now - last > every:
                last = now
                slow = np.flatnonzero(self.clocks < self.clocks[worker.index] - bound)
                stalled(now - began, slow.tolist())
        return True

    def _ahead(self, worker: Worker) -> int:
        mine = int(self.clocks[worker.index])
        return 0 if mine == IDLE else mine - int(self.clocks.min())

    def close(self) -> None:
        """Give back what the store holds. Idempotent; collective where the store is shared."""
