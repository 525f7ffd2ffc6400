"""The shards of one port, as every rank of its node has them: pushed to in place, and served to senders of other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hpcasync.kernels import HYPER
from hpcasync.kernels.atomic import count_up, get, put, take
from hpcasync.kernels.exchange import exchange
from hpcasync.rules import Rule
from hpcasync.store.base import NOTES, Store
from hpcasync.store.layout import Layout, Shard
from hpcasync.store.placement import LINE, WIDTH, Port, Segment
from hpcasync.store.words import whole
from hpcasync.store.worker import Worker

LOCK, VERSION, WRITER, NOTE, SEQUENCE = 0, 1, 2, 3, 7
"""Words of a shard's line. The sequence is odd while the shard is being written."""

OP, READ, FIRST, CLOCK = 0, 1, 2, 3
"""Words at the head of a request."""

ANSWER_VERSION, ANSWER_TAU = 0, 1
"""Words of an answer's line: the version that the sender has now, its staleness or -1."""

PUSH, PULL = 0, 1
"""What a request asks for."""


class Part(Store):
    """The shards of one port, in the memory of this node.

    Locks are compare-and-swap words, taken by the processor's own instruction: all who take them are on the node.

    Args:
        layout: of the whole state.
        port: whose shards.
        segment: where things lie in its memory.
        memory: uint8, the port's.
        rule: bound to the number of workers.
        workers: number of workers.
        clocks: int64 (workers,), this rank's view of the clocks.
        excused: the same of those that rounds do not wait for.
        owner: what this rank writes into a lock.
        threads: threads that work on a shard together.
    """

    def __init__(
        self,
        layout: Layout,
        port: Port,
        segment: Segment,
        memory: np.ndarray,
        rule: Rule,
        *,
        workers: int,
        clocks: np.ndarray,
        excused: np.ndarray,
        owner: int,
        threads: int,
    ) -> None:
        count, senders, total = len(segment.shards), segment.senders, segment.total

        def view(name: str, dtype: type, *shape: int) -> np.ndarray:
            first = segment.offsets[name]
            return memory[first : first + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

        self.port = port
        self._lines = view("lines", np.int64, count * LINE)
        self.lines = lines = self._lines.reshape(count, LINE)
        self.requests = view("requests", np.int64, senders * count)
        self.done = view("done", np.int64, senders * count)
        self._answers = view("answers", np.int64, senders, count, LINE)
        self._tables = view("tables", np.float64, senders, segment.params, WIDTH)
        self._outs = view("outs", np.float32, senders, total)
        self._privates = view("privates", np.float32, senders, segment.private, total)
        self._blocks = memory
        self._segment = segment
        self._owner = owner
        super().__init__(
            port.layout(layout),
            rule,
            workers=workers,
            state=view("state", np.float32, segment.rows, total),
            versions=lines[:, VERSION],
            writers=lines[:, WRITER],
            clocks=clocks,
            excused=excused,
            notes=lines[:, NOTE : NOTE + NOTES],
            threads=threads,
        )
        # In a slot lie only the shards' own parts of the gradients.
        self._sent = [replace(s, pieces=tuple(replace(p, offset=0) for p in s.pieces)) for s in self.layout.shards]
        self._guests = [Worker(s, count, workers, self._privates[i]) for i, s in enumerate(port.senders)]

    def try_lock(self, shard: int, worker: int) -> bool:
        return bool(take(self._lines, LINE * shard + LOCK, self._owner))

    def unlock(self, shard: int, worker: int) -> None:
        put(self._lines, LINE * shard + LOCK, 0)

    def serve(self, index: int) -> bool:
        """Do what an open request asks for, once, whoever tries.

        Args:
            index: of the request in ``requests``.

        Returns:
            False where the shard's lock is held or the request's number is half written: try again.
        """
        sender, k = divmod(index, len(self.layout.shards))
        if not self.try_lock(k, self._owner):
            return False
        try:
            number = get(self.requests, index)
            if not whole(number):
                return False
            if number != get(self.done, index):
                self._execute(sender, k)
                put(self.done, index, number)
        finally:
            self.unlock(k, self._owner)
        return True

    def _execute(self, sender: int, k: int) -> None:
        shard, worker, out = self._sent[k], self._guests[sender], self._outs[sender]
        first = self._segment.block(sender, k)
        size = shard.stop - shard.start
        head = self._blocks[first : first + 8 * LINE].view(np.int64)
        grad = self._blocks[first + 8 * LINE : first + 8 * LINE + 4 * size].view(np.float32)
        tau = -1
        if head[OP] == PULL:
            out[shard.start : shard.stop] = self.state[0, shard.start : shard.stop]
            worker.read[k] = self.versions[k]
        else:
            worker.read[k], worker.pushed[k] = head[READ], not head[FIRST]
            if head[FIRST]:
                for row, vector in enumerate(self.rule.private_vectors if worker.private.size else ()):
                    worker.private[row, shard.start : shard.stop] = vector.start
            table = self._tables[sender]
            grads: list[np.ndarray | None] = [None] * len(table)
            for p in shard.pieces:
                if table[p.param, -1]:
                    grads[p.param] = grad[p.start - shard.start :]
            tau = self._push_shard(worker, k, shard, grads, out, list(table[:, :-1]), int(head[CLOCK]))
        self._answers[sender, k, ANSWER_VERSION] = worker.read[k]
        self._answers[sender, k, ANSWER_TAU] = tau

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
        count_up(self._lines, LINE * k + SEQUENCE)
        push = self._exchange if self.rule.own_copy else super()._push_shard
        tau = push(worker, k, shard, grads, out, hypers, clock)
        count_up(self._lines, LINE * k + SEQUENCE)
        return tau

    def _exchange(
        self,
        worker: Worker,
        k: int,
        shard: Shard,
        grads: Sequence[np.ndarray | None],
        out: np.ndarray,
        hypers: Sequence[np.ndarray],
        clock: int,
    ) -> int:
        """The part of a push that concerns the shared parameters; the worker makes the step of its copy itself."""
        version, read = int(self.versions[k]), int(worker.read[k])
        pieces = [p for p in shard.pieces if grads[p.param] is not None]
        if not pieces:
            worker.read[k] = version
            return -1
        for p in pieces:
            rate = self.rule.tune(hypers[p.param], version + 1, version - read)[HYPER["moving_rate"]]
            exchange(self.state, p.start, out[p.start : p.start + p.size], rate)
        worker.pushed[k] = True
        self.versions[k] = worker.read[k] = version + 1
        self.writers[k] = worker.index
        if worker.observer is not None:
            worker.observer(k, read, version + 1)
        return version - read
