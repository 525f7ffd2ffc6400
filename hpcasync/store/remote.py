"""The store of several nodes: every node owns a share of the shards and applies what the others send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.comm.agree import raise_together
from hpcasync.comm.progress import PROBES, ProgressThread, Watcher
from hpcasync.comm.signs import ANSWER
from hpcasync.comm.world import World
from hpcasync.kernels import GRADIENTS, PLAN
from hpcasync.kernels.atomic import put
from hpcasync.rules import Rule
from hpcasync.rules.base import NO_VECTORS
from hpcasync.store.base import IDLE, NOTES, Store, Worker
from hpcasync.store.hosted import end_hosts, start_hosts
from hpcasync.store.layout import Layout
from hpcasync.store.memory import Memory
from hpcasync.store.part import ANSWER_TAU, ANSWER_VERSION, CLOCK, FIRST, NOTE, OP, PULL, PUSH, READ, SEQUENCE, VERSION, Part
from hpcasync.store.placement import LINE, WIDTH, Segment, place
from hpcasync.store.window import _shared_memory_problem
from hpcasync.store.words import encode, numbers, pair

TRIES = 3
"""Reads of a shard between two reads of its sequence, before its owner is asked to copy it out under the lock."""

WAVE_BYTES = 1 << 20
"""Sent to a peer at a time; from so much on answers are fetched between sends: below, the round trip costs more than it
hides."""


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
        self._segments = [
            Segment(
                tuple(s.stop - s.start for s in layout.shards[slice(*p.shards)]),
                len(p.senders),
                len(layout.sizes),
                rows,
                private,
                0 if i else world.size,
            )
            for i, p in enumerate(self.ports)
        ]
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
        self._meet_peers()
        plan = rule.plan
        compensated = (GRADIENTS["compensated"], GRADIENTS["compensated-adaptive"])
        self._needs_read = plan[PLAN["gradient"]] in compensated and not rule.own_copy
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
            self.layout,
            self.ports[port],
            self._segments[port],
            self._memory.local[port],
            self.rule,
            workers=self.workers,
            clocks=self.clocks,
            excused=self.excused,
            owner=self._world.rank + 1,
            threads=threads,
        )

    def _meet_peers(self) -> None:
        """This rank's slots in the ports of other nodes, and the memory that it sends from."""
        shards, me = self.layout.shards, self._world.rank
        self._peers = [i for i in range(len(self.ports)) if i not in self._memory.local]
        self._slot = {i: self.ports[i].senders.index(me) for i in self._peers}
        self._port_of = {k: i for i in self._peers for k in range(*self.ports[i].shards)}
        self._numbers = [0] * len(shards)  # of the last request of each shard
        self._words = np.zeros((len(shards), 1), np.int64)  # the same as it is sent
        self._done = np.zeros(len(shards), np.int64)
        self._answers = np.zeros((len(shards), LINE), np.int64)
        self._lines = [np.zeros((len(shards), LINE), np.int64) for _ in range(2)]
        self._blocks = {k: np.zeros(8 * LINE + 4 * (shards[k].stop - shards[k].start), np.uint8) for k in self._port_of}
        self._table = np.zeros((len(self.layout.sizes), WIDTH))
        self._sent_table = np.zeros_like(self._table)
        self._slot_is_read = np.zeros(len(shards), bool)  # the slot holds what this rank has last read
        self._pending: dict[int, list[int]] = {i: [] for i in self._peers}

    # The shared state as a whole.

    def publish(self, w: np.ndarray, *, keep_state: bool = False) -> None:
        w = np.array(w, np.float32)
        self._world.collectives.broadcast(w)
        if self._world.local_rank == 0:
            for part in self._parts.values():
                Store.publish(part, w[part.port.start : part.port.stop], keep_state=keep_state)
        self._slot_is_read[:] = False
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
        self._slot_is_read[:] = False
        self.barrier()

    def shard_versions(self) -> list[int]:
        return list(map(int, self._all_lines()[:, VERSION]))

    def shard_notes(self) -> np.ndarray:
        return self._all_lines()[:, NOTE : NOTE + NOTES]

    def _all_lines(self) -> np.ndarray:
        """A copy of every shard's line."""
        self._get_lines(0, list(self._port_of))
        lines = self._lines[0].copy()
        for part in self._parts.values():
            lines[slice(*part.port.shards)] = part.lines
        return lines

    def snapshot(self, worker: Worker) -> np.ndarray:
        copy = np.empty((1 + len(self.rule.vectors), self.layout.total), np.float32)
        for i, part in self._parts.items():
            copy[:, part.port.start : part.port.stop] = part.snapshot(self._subs[i])
        for k in self._port_of:
            backoff = Backoff()
            while self._read_between([k], list(copy)):
                backoff.pause()
        return copy

    def own_vectors(self, worker: Worker) -> np.ndarray:
        if self.rule.own_copy or not self.rule.private_vectors:
            return super().own_vectors(worker)
        values = np.empty((len(self.rule.private_vectors), self.layout.total), np.float32)
        for i, part in self._parts.items():
            values[:, part.port.start : part.port.stop] = self._subs[i].private
        self._for_slot_vectors(values, self._memory.get)
        return values

    def set_own_vectors(self, worker: Worker, values: np.ndarray) -> None:
        if self.rule.own_copy:
            super().set_own_vectors(worker, values)
            return
        for i, part in self._parts.items():
            self._subs[i].private[:] = values[:, part.port.start : part.port.stop]
        self._for_slot_vectors(values, self._memory.put)

    def _for_slot_vectors(self, values: np.ndarray, move: Callable[[int, int, np.ndarray], None]) -> None:
        """Put or get this rank's vectors in its slots at the owners of other nodes; none of its requests is open."""
        for i in self._peers:
            port, segment = self.ports[i], self._segments[i]
            for row, vector in enumerate(values):
                at = segment.offsets["privates"] + 4 * segment.total * (segment.private * self._slot[i] + row)
                move(i, at, vector[port.start : port.stop])
            self._memory.flush(i)

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
        self._send_table(grads, hypers)
        for wave in self._waves(worker):
            for k in wave:
                self._stage(k, worker, grads, out)
            self._send(wave)
            if sum(self._blocks[k].size for k in wave) >= WAVE_BYTES:
                self._collect(worker, out)
        for i, part in self._parts.items():
            with _Sub(self, worker, i) as sub:
                part._push_shards(sub, grads, out[part.port.start : part.port.stop], hypers)
        self._collect_all(worker, out)

    def _send_table(self, grads: Sequence[np.ndarray | None], hypers: Sequence[np.ndarray]) -> None:
        """Tell the peers hyper-parameters and which parameters have a gradient, where they have changed."""
        for row, hyper, grad in zip(self._table, hypers, grads, strict=True):
            row[:-1] = hyper
            row[-1] = grad is not None
        if np.array_equal(self._table, self._sent_table):
            return
        self._sent_table[:] = self._table
        for i in self._peers:
            first = self._segments[i].offsets["tables"] + self._table.nbytes * self._slot[i]
            self._memory.put(i, first, self._sent_table)

    def _waves(self, worker: Worker) -> Iterator[list[int]]:
        """The remote shards in waves of ``WAVE_BYTES`` per peer (one shard at least): the peers work side by side."""
        queues = {}
        for i in self._peers:
            first, last = self.ports[i].shards
            queues[i] = [first + (turn + worker.index) % (last - first) for turn in range(last - first)][::-1]
        while any(queues.values()):
            wave = []
            for queue in queues.values():
                room = WAVE_BYTES
                while queue and (room == WAVE_BYTES or self._blocks[queue[-1]].size <= room):
                    room -= self._blocks[queue[-1]].size
                    wave.append(queue.pop())
            yield wave

    def _stage(self, k: int, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray) -> None:
        """Begin to put a push of shard ``k`` into its slot."""
        i, shard, block = self._port_of[k], self.layout.shards[k], self._blocks[k]
        q, slot, segment = k - self.ports[i].shards[0], self._slot[i], self._segments[i]
        head = block[: 8 * LINE].view(np.int64)
        head[OP], head[READ], head[FIRST] = PUSH, worker.read[k], not worker.pushed[k]
        head[CLOCK] = self.clocks[worker.index]
        if self.rule.own_copy:
            block = block[: 8 * LINE]
        else:
            values = block[8 * LINE :].view(np.float32)
            for p in shard.pieces:
                grad = grads[p.param]
                if grad is not None:
                    first = p.start - shard.start
                    values[first : first + p.size] = grad[p.offset : p.offset + p.size]
        self._memory.put(i, segment.block(slot, q), block)
        if self.rule.own_copy or (self._needs_read and not self._slot_is_read[k]):
            self._memory.put(i, segment.out(slot, shard.start - self.ports[i].start), out[shard.start : shard.stop])

    def _send(self, wave: Sequence[int]) -> None:
        """Say that the requests are complete: a request's number follows its content."""
        self._flush(wave)
        for k in wave:
            i = self._port_of[k]
            self._numbers[k] += 1
            self._words[k] = encode(self._numbers[k])
            at = self._segments[i].word("requests", self._slot[i], k - self.ports[i].shards[0])
            self._memory.put(i, at, self._words[k])
            self._pending[i].append(k)

    def _collect(self, worker: Worker, out: np.ndarray) -> bool:
        """Fetch the answers that are there; whether there were any."""
        waiting = [i for i in self._peers if self._pending[i]]
        for i in waiting:
            first, last = self.ports[i].shards
            self._memory.get(i, self._segments[i].word("done", self._slot[i]), self._done[first:last])
        for i in waiting:
            self._memory.flush(i)
        ready = [k for i in waiting for k in self._pending[i] if self._done[k] == self._words[k, 0]]
        for k in ready:
            i, shard = self._port_of[k], self.layout.shards[k]
            first = self.ports[i].shards[0]
            segment, slot = self._segments[i], self._slot[i]
            answer = segment.offsets["answers"] + 8 * LINE * (len(segment.shards) * slot + k - first)
            self._memory.get(i, answer, self._answers[k])
            self._memory.get(i, segment.out(slot, shard.start - self.ports[i].start), out[shard.start : shard.stop])
        self._flush(ready)
        for k in ready:
            self._pending[self._port_of[k]].remove(k)
            self._note_answer(k, worker)
        return bool(ready)

    def _note_answer(self, k: int, worker: Worker) -> None:
        read, version, tau = int(worker.read[k]), int(self._answers[k, ANSWER_VERSION]), int(self._answers[k, ANSWER_TAU])
        worker.read[k] = version
        self._slot_is_read[k] = True
        if tau < 0:
            return
        worker.pushed[k] = True
        worker.staleness.add(tau)
        if worker.observer is not None:
            worker.observer(k, read, version)

    def _collect_all(self, worker: Worker, out: np.ndarray) -> None:
        backoff = Backoff()
        while any(self._pending.values()):
            if self._collect(worker, out):
                backoff = Backoff()
            else:
                backoff.pause()

    def pull(self, worker: Worker, out: np.ndarray) -> None:
        asked: list[int] = []
        worker.waits(ANSWER)
        for wave in self._waves(worker):
            for _ in range(TRIES):
                moving = self._read_between(wave, [out])
                for k in set(wave) - set(moving):
                    worker.read[k] = self._lines[1][k, VERSION]
                    self._slot_is_read[k] = False
                wave = moving
                if not wave:
                    break
            asked += wave
        for k in asked:  # it changes faster than it can be read
            i = self._port_of[k]
            head = self._blocks[k][: 8 * LINE]
            head.view(np.int64)[OP] = PULL
            self._memory.put(i, self._segments[i].block(self._slot[i], k - self.ports[i].shards[0]), head)
        self._send(asked)
        for i, part in self._parts.items():
            with _Sub(self, worker, i) as sub:
                part.pull(sub, out[part.port.start : part.port.stop])
        self._collect_all(worker, out)
        worker.goes_on()

    def _read_between(self, shards: Sequence[int], rows: Sequence[np.ndarray]) -> list[int]:
        """Read the shards' first rows of the state between two reads of their sequences; returns those that changed."""
        self._get_lines(0, shards)
        for k in shards:
            i, shard = self._port_of[k], self.layout.shards[k]
            for row, values in enumerate(rows):
                element = self._segments[i].total * row + shard.start - self.ports[i].start
                at = self._segments[i].offsets["state"] + 4 * element
                self._memory.get(i, at, values[shard.start : shard.stop])
        self._flush(shards)
        self._get_lines(1, shards)
        if self.rule.lock_free:
            return []
        before, after = self._lines
        moving = (before[:, SEQUENCE] % 2 != 0) | (before[:, SEQUENCE] != after[:, SEQUENCE])
        moving |= before[:, VERSION] != after[:, VERSION]
        return [k for k in shards if moving[k]]

    def _get_lines(self, when: int, shards: Sequence[int]) -> None:
        """Read the lines of remote shards into ``_lines[when]``."""
        for k in shards:
            i = self._port_of[k]
            at = self._segments[i].offsets["lines"] + 8 * LINE * (k - self.ports[i].shards[0])
            self._memory.get(i, at, self._lines[when][k])
        self._flush(shards)

    def _flush(self, shards: Sequence[int]) -> None:
        for i in {self._port_of[k] for k in shards}:
            self._memory.flush(i)

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
