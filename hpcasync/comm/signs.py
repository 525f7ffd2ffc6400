"""Signs of life: what every rank is at just now, for all ranks to read without MPI.

A rank has a line of int64 words in its node's shared memory. Ranks of other nodes learn it from datagrams (UDP), which a
frozen rank can't block and no file system delays; a lost one is made up for by the next.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hpcasync.comm.addresses import addresses

if TYPE_CHECKING:  # a World may hold a watch, which has signs
    from hpcasync.comm.world import World

BEAT, OPERATIONS, WAITS, PHASE, STEPS, MADE, PID, STATE = range(8)
"""Words of a line: beats of its watch thread; operations that the rank has come to; the kind of the one it is in, 0 for none;
its phase; steps made in all and since the start; process; what its watch thread does."""

WORDS = 8
AT_WORK, ENDING, ENDED, TOLD, LEFT = range(5)
"""Values of ``STATE``: nothing to say, it ends the job, the end is now, it has told where it is, it has left."""

PHASES = ("training", "the meeting at the end of an epoch", "evaluation", "a checkpoint", "asking for signals")
KINDS = ("", "the average of the gradients", "the average of the models", "a sum", "a broadcast", "a barrier", "a gather",
         "a message", "a shard's lock", "its turn", "the bound on staleness", "the answer of another node")  # fmt: skip
NONE, GRADIENTS, MODELS, SUM, BROADCAST, BARRIER, GATHER, MESSAGE, LOCK, TURN, BOUND, ANSWER = range(len(KINDS))

Result = TypeVar("Result")
_PACKET = struct.Struct(f"<16si{WORDS}q")
_PARK_SECONDS = 0.02


class Signs:
    """The ranks' lines; this rank's own is written by the thread that trains. The constructor is collective.

    Args:
        world: the ranks.
        memory: zeros, uint8 (ranks of the node, 8 ``WORDS`` or more), that they share.

    Attributes:
        places: per rank its node and the node's name.
        hold: keep the training thread in the operation that it is in, once it comes back from it.
    """

    def __init__(self, world: World, memory: np.ndarray) -> None:
        rows = memory.view(np.int64)[:, :WORDS]
        self.rank, self.node = world.rank, world.node
        self.places: list[tuple[int, str]] = world.gather((world.node, socket.gethostname()))
        self._near = rows
        self._neighbours = [r for r, (node, _) in enumerate(self.places) if node == world.node]
        self._far = np.zeros((world.size, WORDS), np.int64)
        self._mine = memoryview(rows[world.local_rank])  # ten times as fast as numpy's own indexing
        self._mine[PID] = os.getpid()
        self._post = _Post(world, self.places) if world.nodes > 1 else None
        self.hold = False

    def lines(self) -> np.ndarray:
        """All lines, int64 (ranks, ``WORDS``): a copy."""
        lines = self._far.copy()
        lines[self._neighbours] = self._near
        return lines

    def beat(self) -> None:
        """Say that this process runs, and hear what the other nodes say."""
        self._mine[BEAT] += 1
        if self._post is not None:
            self._post.send(bytes(self._mine))
            for rank, line in self._post.receive():
                if line[BEAT] > self._far[rank, BEAT]:  # datagrams may overtake each other
                    self._far[rank] = line

    def say(self, word: int, value: int) -> None:
        """Set a word of this rank's line."""
        self._mine[word] = value

    def stepped(self) -> None:
        """A step is done."""
        self._mine[STEPS] += 1
        self._mine[MADE] += 1

    def within(self, kind: int, work: Callable[..., Result], *args: Any) -> Result:
        """``work(*args)``, an operation for which this rank may wait for others; ``kind`` is one of ``KINDS``."""
        before = self.begin(kind)
        try:
            return work(*args)
        finally:
            self.end(before)

    def begin(self, kind: int) -> int:
        """From here on this rank waits; give ``end`` what this returns."""
        before: int = self._mine[WAITS]
        self._mine[OPERATIONS] += 1
        self._mine[WAITS] = before or kind  # one within another has the outer one's name
        return before

    def end(self, before: int) -> None:
        """It has what it waited for."""
        self._mine[WAITS] = before
        while self.hold:  # the job is about to end, and this rank's state is being saved
            time.sleep(_PARK_SECONDS)

    def bury(self, rank: int) -> None:
        """A rank of this node has died, and nobody is to wait for it."""
        self._near[self._neighbours.index(rank), STATE] = LEFT

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, what this rank does is called so; one of ``PHASES``."""
        before: int = self._mine[PHASE]
        self._mine[PHASE] = PHASES.index(name)
        try:
            yield
        finally:
            self._mine[PHASE] = before

    def close(self) -> None:
        """Tell the others that this rank has left."""
        self._mine[STATE] = LEFT
        self.beat()
        if self._post is not None:
            self._post.close()
            self._post = None


class _Post:
    """Datagrams to and from the ranks of the other nodes. The constructor is collective."""

    def __init__(self, world: World, places: list[tuple[int, str]]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # Of every rank there may be a datagram in each tick; the system's default holds 256 of them.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(1 << 22, 2048 * max(128, world.size)))
        self._socket.bind(("", 0))
        self._socket.setblocking(False)
        self._rank = world.rank
        found = world.gather((uuid.uuid4().bytes, addresses(), self._socket.getsockname()[1]))
        self._token = found[0][0]
        # At all addresses of a rank, until a datagram of its own tells the one that leads there.
        self._to = {
            rank: [(address, port) for address in theirs]
            for rank, (_, theirs, port) in enumerate(found)
            if places[rank][0] != world.node
        }

    def send(self, line: bytes) -> None:
        packet = self._token + struct.pack("<i", self._rank) + line
        for targets in self._to.values():
            for target in targets:
                with contextlib.suppress(OSError):  # a full queue, a network that is down: the next one may arrive
                    self._socket.sendto(packet, target)

    def receive(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        with contextlib.suppress(OSError):
            while True:
                packet, source = self._socket.recvfrom(2 * _PACKET.size)
                if len(packet) == _PACKET.size and packet.startswith(self._token):
                    _, rank, *line = _PACKET.unpack(packet)
                    if rank in self._to:
                        self._to[rank] = [source]
                        yield rank, tuple(line)

    def close(self) -> None:
        self._socket.close()
