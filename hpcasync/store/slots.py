"""What a rank does at the owners of other nodes' shards: its slots there, requests and answers, reads between two versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.kernels import GRADIENTS, PLAN
from hpcasync.rules import Rule
from hpcasync.store.layout import Layout
from hpcasync.store.memory import Memory
from hpcasync.store.part import ANSWER_TAU, ANSWER_VERSION, CLOCK, FIRST, OP, PULL, PUSH, READ, SEQUENCE, VERSION
from hpcasync.store.placement import LINE, WIDTH, Port, Segment
from hpcasync.store.words import encode
from hpcasync.store.worker import Worker

TRIES = 3
"""Reads of a shard between two reads of its sequence, before its owner is asked to copy it out under the lock."""

WAVE_BYTES = 1 << 20
"""Sent to a peer at a time; from so much on answers are fetched between sends: below, the round trip costs more than it
hides."""


class Slots:
    """This rank's slots in the ports of other nodes, and the memory that it sends from.

    Args:
        memory: of all ports.
        layout: of the whole state.
        ports: of all nodes.
        segments: of the ports, in the same order.
        rule: what a gradient does.
        me: this rank.

    Attributes:
        peers: numbers of the ports of other nodes.
        port_of: the port of each of their shards.
        numbers: of the last request of each shard.
    """

    def __init__(
        self, memory: Memory, layout: Layout, ports: Sequence[Port], segments: Sequence[Segment], rule: Rule, me: int
    ) -> None:
        self._memory, self._layout, self._ports, self._segments = memory, layout, ports, segments
        self._own_copy, self._lock_free = rule.own_copy, rule.lock_free
        compensated = (GRADIENTS["compensated"], GRADIENTS["compensated-adaptive"])
        self._needs_read = rule.plan[PLAN["gradient"]] in compensated and not rule.own_copy
        shards = layout.shards
        self.peers = [i for i in range(len(self._ports)) if i not in self._memory.local]
        self._slot = {i: self._ports[i].senders.index(me) for i in self.peers}
        self.port_of = {k: i for i in self.peers for k in range(*self._ports[i].shards)}
        self.numbers = [0] * len(shards)  # of the last request of each shard
        self._words = np.zeros((len(shards), 1), np.int64)  # the same as it is sent
        self._done = np.zeros(len(shards), np.int64)
        self._answers = np.zeros((len(shards), LINE), np.int64)
        self._lines = [np.zeros((len(shards), LINE), np.int64) for _ in range(2)]
        self._blocks = {k: np.zeros(8 * LINE + 4 * (shards[k].stop - shards[k].start), np.uint8) for k in self.port_of}
        self._table = np.zeros((len(self._layout.sizes), WIDTH))
        self._sent_table = np.zeros_like(self._table)
        self._slot_is_read = np.zeros(len(shards), bool)  # the slot holds what this rank has last read
        self._pending: dict[int, list[int]] = {i: [] for i in self.peers}

    def forget(self) -> None:
        """What lies in the slots is no longer what this rank has read."""
        self._slot_is_read[:] = False

    def begin_push(
        self,
        worker: Worker,
        grads: Sequence[np.ndarray | None],
        out: np.ndarray,
        hypers: Sequence[np.ndarray],
        clock: int,
    ) -> None:
        """Send a gradient to the owners; ``finish`` brings the new parameters. Arguments as of ``Store.push_pull``."""
        self._send_table(grads, hypers)
        for wave in self._waves(worker):
            for k in wave:
                self._stage(k, worker, grads, out, clock)
            self._send(wave)
            if sum(self._blocks[k].size for k in wave) >= WAVE_BYTES:
                self._collect(worker, out)

    def begin_pull(self, worker: Worker, out: np.ndarray) -> None:
        """Read the parameters of other nodes into ``out``; ``finish`` brings those that change too fast to be read."""
        asked: list[int] = []
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
            i = self.port_of[k]
            head = self._blocks[k][: 8 * LINE]
            head.view(np.int64)[OP] = PULL
            self._memory.put(i, self._segments[i].block(self._slot[i], k - self._ports[i].shards[0]), head)
        self._send(asked)

    def lines(self) -> np.ndarray:
        """A copy of the lines of other nodes' shards, int64 (shards, LINE)."""
        self._get_lines(0, list(self.port_of))
        return self._lines[0].copy()

    def read(self, rows: np.ndarray) -> None:
        """Read other nodes' shards of the state into ``rows``, each of one version."""
        for k in self.port_of:
            backoff = Backoff()
            while self._read_between([k], list(rows)):
                backoff.pause()

    def move_vectors(self, values: np.ndarray, move: Callable[[int, int, np.ndarray], None]) -> None:
        """Put or get this rank's vectors in its slots at the owners of other nodes; none of its requests is open."""
        for i in self.peers:
            port, segment = self._ports[i], self._segments[i]
            for row, vector in enumerate(values):
                at = segment.offsets["privates"] + 4 * segment.total * (segment.private * self._slot[i] + row)
                move(i, at, vector[port.start : port.stop])
            self._memory.flush(i)

    def _send_table(self, grads: Sequence[np.ndarray | None], hypers: Sequence[np.ndarray]) -> None:
        """Tell the peers hyper-parameters and which parameters have a gradient, where they have changed."""
        for row, hyper, grad in zip(self._table, hypers, grads, strict=True):
            row[:-1] = hyper
            row[-1] = grad is not None
        if np.array_equal(self._table, self._sent_table):
            return
        self._sent_table[:] = self._table
        for i in self.peers:
            first = self._segments[i].offsets["tables"] + self._table.nbytes * self._slot[i]
            self._memory.put(i, first, self._sent_table)

    def _waves(self, worker: Worker) -> Iterator[list[int]]:
        """The remote shards in waves of ``WAVE_BYTES`` per peer (one shard at least): the peers work side by side."""
        queues = {}
        for i in self.peers:
            first, last = self._ports[i].shards
            queues[i] = [first + (turn + worker.index) % (last - first) for turn in range(last - first)][::-1]
        while any(queues.values()):
            wave = []
            for queue in queues.values():
                room = WAVE_BYTES
                while queue and (room == WAVE_BYTES or self._blocks[queue[-1]].size <= room):
                    room -= self._blocks[queue[-1]].size
                    wave.append(queue.pop())
            yield wave

    def _stage(
        self, k: int, worker: Worker, grads: Sequence[np.ndarray | None], out: np.ndarray, clock: int
    ) -> None:
        """Begin to put a push of shard ``k`` into its slot."""
        i, shard, block = self.port_of[k], self._layout.shards[k], self._blocks[k]
        q, slot, segment = k - self._ports[i].shards[0], self._slot[i], self._segments[i]
        head = block[: 8 * LINE].view(np.int64)
        head[OP], head[READ], head[FIRST] = PUSH, worker.read[k], not worker.pushed[k]
        head[CLOCK] = clock
        if self._own_copy:
            block = block[: 8 * LINE]
        else:
            values = block[8 * LINE :].view(np.float32)
            for p in shard.pieces:
                grad = grads[p.param]
                if grad is not None:
                    first = p.start - shard.start
                    values[first : first + p.size] = grad[p.offset : p.offset + p.size]
        self._memory.put(i, segment.block(slot, q), block)
        if self._own_copy or (self._needs_read and not self._slot_is_read[k]):
            self._memory.put(i, segment.out(slot, shard.start - self._ports[i].start), out[shard.start : shard.stop])

    def _send(self, wave: Sequence[int]) -> None:
        """Say that the requests are complete: a request's number follows its content."""
        self._flush(wave)
        for k in wave:
            i = self.port_of[k]
            self.numbers[k] += 1
            self._words[k] = encode(self.numbers[k])
            at = self._segments[i].word("requests", self._slot[i], k - self._ports[i].shards[0])
            self._memory.put(i, at, self._words[k])
            self._pending[i].append(k)

    def _collect(self, worker: Worker, out: np.ndarray) -> bool:
        """Fetch the answers that are there; whether there were any."""
        waiting = [i for i in self.peers if self._pending[i]]
        for i in waiting:
            first, last = self._ports[i].shards
            self._memory.get(i, self._segments[i].word("done", self._slot[i]), self._done[first:last])
        for i in waiting:
            self._memory.flush(i)
        ready = [k for i in waiting for k in self._pending[i] if self._done[k] == self._words[k, 0]]
        for k in ready:
            i, shard = self.port_of[k], self._layout.shards[k]
            first = self._ports[i].shards[0]
            segment, slot = self._segments[i], self._slot[i]
            answer = segment.offsets["answers"] + 8 * LINE * (len(segment.shards) * slot + k - first)
            self._memory.get(i, answer, self._answers[k])
            self._memory.get(i, segment.out(slot, shard.start - self._ports[i].start), out[shard.start : shard.stop])
        self._flush(ready)
        for k in ready:
            self._pending[self.port_of[k]].remove(k)
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

    def finish(self, worker: Worker, out: np.ndarray) -> None:
        """Wait for all answers, and bring the parameters that came with them to ``out``."""
        backoff = Backoff()
        while any(self._pending.values()):
            if self._collect(worker, out):
                backoff = Backoff()
            else:
                backoff.pause()

    def _read_between(self, shards: Sequence[int], rows: Sequence[np.ndarray]) -> list[int]:
        """Read the shards' first rows of the state between two reads of their sequences; returns those that changed."""
        self._get_lines(0, shards)
        for k in shards:
            i, shard = self.port_of[k], self._layout.shards[k]
            for row, values in enumerate(rows):
                element = self._segments[i].total * row + shard.start - self._ports[i].start
                at = self._segments[i].offsets["state"] + 4 * element
                self._memory.get(i, at, values[shard.start : shard.stop])
        self._flush(shards)
        self._get_lines(1, shards)
        if self._lock_free:
            return []
        before, after = self._lines
        moving = (before[:, SEQUENCE] % 2 != 0) | (before[:, SEQUENCE] != after[:, SEQUENCE])
        moving |= before[:, VERSION] != after[:, VERSION]
        return [k for k in shards if moving[k]]

    def _get_lines(self, when: int, shards: Sequence[int]) -> None:
        """Read the lines of remote shards into ``_lines[when]``."""
        for k in shards:
            i = self.port_of[k]
            at = self._segments[i].offsets["lines"] + 8 * LINE * (k - self._ports[i].shards[0])
            self._memory.get(i, at, self._lines[when][k])
        self._flush(shards)

    def _flush(self, shards: Sequence[int]) -> None:
        for i in {self.port_of[k] for k in shards}:
            self._memory.flush(i)
