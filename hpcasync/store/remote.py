"""The store of several nodes: every node owns a share of the shards and applies what the others send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcasync.comm.agree import raise_together
from hpcasync.comm.progress import PROBES, ProgressThread, Watcher
from hpcasync.comm.signs import ANSWER
from hpcasync.comm.world import World
from hpcasync.kernels.atomic import put
from hpcasync.rules import Rule
from hpcasync.rules.base import NO_VECTORS
from hpcasync.store.base import NOTES, Store
from hpcasync.store.clocks import IDLE
from hpcasync.store.hosted import end_hosts, start_hosts
from hpcasync.store.layout import Layout
from hpcasync.store.memory import Memory
from hpcasync.store.part import NOTE, VERSION, Part
from hpcasync.store.placement import place, segments_of
from hpcasync.store.slots import Slots
from hpcasync.store.window import _shared_memory_problem
from hpcasync.store.words import numbers, pair
from hpcasync.store.worker import Worker


class RemoteStore(Store):
    """Shared state dealt out over the nodes. Constructor, ``publish``, ``install``, ``barrier``, ``close`` are collective.

    A shard of this node is pushed to as in the window of one node. For one of another node the gradient is ``Put`` into
    this rank's own slot there, one word tells that it is complete, and a rank of that node applies it under the
    shard's lock with the same kernel, which writes the new parameters into the slot; from there a ``Get`` brings them.
    A pull is a ``Get`` between two reads of the shard's sequence, which is odd while it is written.

    So every update is applied exactly once and in full, in one order per shard that all see, and ``push_pull`` returns
    when it has been. A slot has one writer per word, and the number of a request tells whether it has been done.

    Args:
        world: the ranks; all are workers.
        layout: where each parameter lies.
        rule: what a gradient does.
        threads: threads that work on a shard together.
        progress: ``"thread"``: a thread of each rank lets MPI go on; ``"library"``: MPI needs no help; ``"host-rank"``:
            the host ranks of ``world`` hold the memory and serve it.
        clocked: keep the others' view of this rank's clock up to date; it costs a round trip per push.

    Raises:
        UsageError: shared memory too small; a second store at a time with host ranks.
    """

    def __init__(
        self,
        world: World,
        layout: Layout,
        rule: Rule,
        *,
        threads: int = 1,
        progress: str = "thread",
        clocked: bool = True,
    ) -> None:
        self._world = world
        self._clocked = clocked
        self._open = True
        rule = rule.bind(world.size)
        rows, me = 1 + len(rule.vectors), world.rank
        nodes = world.gather(world.node)
        hosts = world.hosts
        self.ports = place(layout, list(enumerate(nodes)) if hosts is None else hosts.ports, nodes)
        # With copies of their own the workers keep their vectors; otherwise those stand where they are used.
        private = 0 if rule.own_copy else len(rule.private_vectors)
        self._segments = segments_of(layout, self.ports, rows, private, world.size)
        need = sum(s.offsets["end"] for p, s in zip(self.ports, self._segments) if p.node == world.node)
        raise_together(world, _shared_memory_problem(need) if world.local_rank == 0 else None)
        if hosts is not None:
            start_hosts(hosts, layout, rule, world.size, self.ports, self._segments)
        comm, node_comm = (world.comm, world.node_comm) if hosts is None else (hosts.comm, hosts.node_comm)
        self._memory = Memory(comm, node_comm, self.ports, self._segments)
        shared = self._memory.local.get(0)  # the clocks are in the first port
        self._clock_words = None if shared is None else shared[: self._segments[0].offsets["lines"]].view(np.int64)
        none = np.empty(0, np.int64)
        super().__init__(
            layout,
            rule,
            workers=world.size,
            state=np.empty((rows, 0), np.float32),
            versions=none,
            writers=none,
            clocks=np.zeros(world.size, np.int64),
            excused=np.zeros(world.size, np.int64),
            notes=none,
            threads=threads,
        )
        self._parts = {i: self._part(i, threads) for i in self._memory.local}
        self._subs: dict[int, Worker] = {}
        self._slots = Slots(self._memory, layout, self.ports, self._segments, rule, me)
        self._probe_comm = comm.Dup()
        self._thread: ProgressThread | None = None
        mine = [i for i, p in enumerate(self.ports) if p.rank == me and p.senders]
        if mine and hosts is None:
            server = self._part(mine[0], 1)
            probes = PROBES if progress == "thread" else 0
            watcher = Watcher(self._probe_comm, server.requests, server.done, probes=probes, gate=self._memory.gate)
            self._thread = ProgressThread(watcher, server.serve)
        self.barrier()

    def _part(self, port: int, threads: int) -> Part:
        return Part(
            self.layout, self.ports[port], self._segments[port], self._memory.local[port], self.rule,
            workers=self.workers, clocks=self.clocks, excused=self.excused, owner=self._world.rank + 1, threads=threads,
        )  # fmt: skip

    # The shared state as a whole.

    def publish(self, w: np.ndarray, *, keep_state: bool = False) -> None:
        w = np.array(w, np.float32)
        self._world.collectives.broadcast(w)
        if self._world.local_rank == 0:
            for part in self._parts.values():
                Store.publish(part, w[part.port.start : part.port.stop], keep_state=keep_state)
        self._slots.forget()
        self.barrier()

    def install(self, state: np.ndarray | None, versions: Sequence[int], notes: np.ndarray | None = None) -> None:
        versions = self._own_versions(versions)
        writes = self._world.local_rank == 0
        for row in range(1 + len(self.rule.vectors)):
            values = np.empty(self.layout.total, np.float32) if state is None else np.ascontiguousarray(state[row])
            self._world.collectives.broadcast(values)
            for part in self._parts.values() if writes else ():
                part.state[row] = values[part.port.start : part.port.stop]
        for part in self._parts.values() if writes else ():
            part.notes[:] = 0 if notes is None else notes[slice(*part.port.shards)]
            part.writers[:] = -1
            part.versions[:] = versions[slice(*part.port.shards)]
        self._slots.forget()
        self.barrier()

    def shard_versions(self) -> list[int]:
        return list(map(int, self._all_lines()[:, VERSION]))

    def shard_notes(self) -> np.ndarray:
        return self._all_lines()[:, NOTE : NOTE + NOTES]

    def _all_lines(self) -> np.ndarray:
        """A copy of every shard's line."""
        lines = self._slots.lines()
        for part in self._parts.values():
            lines[slice(*part.port.shards)] = part.lines
        return lines

    def snapshot(self, worker: Worker) -> np.ndarray:
        copy = np.empty((1 + len(self.rule.vectors), self.layout.total), np.float32)
        for i, part in self._parts.items():
            copy[:, part.port.start : part.port.stop] = part.snapshot(self._subs[i])
        self._slots.read(copy)
        return copy

    def own_vectors(self, worker: Worker) -> np.ndarray:
        if self.rule.own_copy or not self.rule.private_vectors:
            return super().own_vectors(worker)
        values = np.empty((len(self.rule.private_vectors), self.layout.total), np.float32)
        for i, part in self._parts.items():
            values[:, part.port.start : part.port.stop] = self._subs[i].private
        self._slots.move_vectors(values, self._memory.get)
        return values

    def set_own_vectors(self, worker: Worker, values: np.ndarray) -> None:
        if self.rule.own_copy:
            super().set_own_vectors(worker, values)
            return
        for i, part in self._parts.items():
            self._subs[i].private[:] = values[:, part.port.start : part.port.stop]
        self._slots.move_vectors(values, self._memory.put)

    def restart(self, worker: Worker) -> None:
        """As in any store; a slot's private vectors start anew with the next request, which says that it is the first."""
        super().restart(worker)
        vectors = self.rule.private_vectors
        self._subs = {}
        for i, part in self._parts.items():
            first, last = part.port.shards
            sub = Worker(worker.index, last - first, self.workers, NO_VECTORS)
            sub.read, sub.pushed, sub.staleness = worker.read[first:last], worker.pushed[first:last], worker.staleness
            if vectors and not self.rule.own_copy:
                sub.private = np.empty((len(vectors), part.layout.total), np.float32)
                for row, vector in enumerate(vectors):
                    sub.private[row] = vector.start
            self._subs[i] = sub
        if not self.rule.own_copy:
            worker.private = NO_VECTORS

    # Push and pull.

    def push_pull(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        own_copy = self.rule.own_copy
        if worker.steps % self.rule.every == 0:
            worker.waits(ANSWER)
            self._push_everywhere(worker, grads, out, hypers)
            worker.goes_on()
        if own_copy:
            self._step_alone(worker, grads, out, hypers)
        worker.steps += 1
        self.tick(worker)

    def _push_everywhere(
        self, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, hypers: Sequence[np.ndarray]
    ) -> None:
        self._slots.begin_push(worker, grads, out, hypers, int(self.clocks[worker.index]))
        for i, part in self._parts.items():
            with _Sub(self, worker, i) as sub:
                part._push_shards(sub, grads, out[part.port.start : part.port.stop], hypers)
        self._slots.finish(worker, out)

    def pull(self, worker: Worker, out: np.ndarray) -> None:
        worker.waits(ANSWER)
        self._slots.begin_pull(worker, out)
        for i, part in self._parts.items():
            with _Sub(self, worker, i) as sub:
                part.pull(sub, out[part.port.start : part.port.stop])
        self._slots.finish(worker, out)
        worker.goes_on()

    # Clocks: one table, in the memory of the first port.

    def tick(self, worker: Worker) -> None:
        i = worker.index
        mine = int(self.clocks[i])
        if mine != IDLE and self._clocked:
            self.set_clock(i, mine + 1)
        elif mine != IDLE:
            self.clocks[i] = mine + 1

    def look(self) -> None:
        start, last = self._segments[0].offsets["excused"] // 8, self._segments[0].offsets["lines"] // 8
        while True:
            words = np.empty(last, np.int64) if self._clock_words is None else self._clock_words.copy()
            if self._clock_words is None:
                self._memory.get(0, 0, words)
                self._memory.flush(0)
            clocks, excused = (numbers(words[first : first + 2 * self.workers]) for first in (0, start))
            if clocks.min() >= 0 and excused.min() >= 0:
                self.clocks[:], self.excused[:] = clocks, excused
                return

    def set_clock(self, worker: int, value: int) -> None:
        super().set_clock(worker, value)
        self._set_word("clocks", worker, value)

    def set_excused(self, worker: int, value: int) -> None:
        super().set_excused(worker, value)
        self._set_word("excused", worker, value)

    def _set_word(self, name: str, worker: int, value: int) -> None:
        at, words = self._segments[0].offsets[name] + 16 * worker, pair(value)
        if self._clock_words is not None:
            for i, word in enumerate(words):
                put(self._clock_words, at // 8 + i, word)
        else:
            self._memory.put(0, at, words)
            self._memory.flush(0)

    def barrier(self) -> None:
        self._memory.sync()
        self._world.collectives.barrier()
        self._memory.sync()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.barrier()
        if self._thread is not None:
            self._thread.stop()
        if self._world.hosts is not None:
            end_hosts(self._world.hosts)
        self._parts = {}
        self._subs = {}
        self._clock_words = None
        self._memory.free()
        self._probe_comm.Free()


class _Sub:
    """A worker's view of one part while it works there; its waiting and its observer are the worker's."""

    def __init__(self, store: RemoteStore, worker: Worker, port: int) -> None:
        self._worker, self._sub = worker, store._subs[port]
        self._first = store.ports[port].shards[0]

    def __enter__(self) -> Worker:
        observer, first = self._worker.observer, self._first
        self._sub.observer = None if observer is None else lambda k, read, version: observer(first + k, read, version)
        return self._sub

    def __exit__(self, *error: Any) -> None:
        self._worker.waited += self._sub.waited
        self._sub.waited = 0.0
