"""Every rank's row where others can read it: in memory that the node's ranks share, sent to rank 0 from other nodes."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

from hpcasync.backoff import Backoff
from hpcasync.comm import World
from hpcasync.comm.shared_memory import shared_file
from hpcasync.train.live_row import NBYTES, Row, State, read_rows, write_row


class Board:
    """The rows of all ranks. Writing one is a few stores to memory; no rank waits for another. Constructor collective.

    Rank 0 and the processes that it gives ``descriptor`` to see all ranks: those of its own node at once, those of other
    nodes as far as their first rank has sent them and rank 0 has taken them, each when it writes its own row.

    Args:
        world: the ranks.

    Attributes:
        descriptor: of the memory.

    Raises:
        UsageError: on every rank, if a node's shared memory is too small.
    """

    def __init__(self, world: World) -> None:
        self._rank, self._size, self._count = world.rank, world.size, 0
        self.descriptor = shared_file(world, NBYTES * world.size, (NBYTES * world.rank, NBYTES))
        self._memory = mmap.mmap(self.descriptor, NBYTES * world.size)
        self._relay = None
        if world.nodes > 1:
            nodes = world.gather(world.node)
            members = [[r for r, node in enumerate(nodes) if node == n] for n in range(world.nodes)]
            if world.leaders is not None:
                self._relay = _Relay(world.leaders.Dup(), members, self._memory)

    def write(self, row: Row) -> None:
        """Tell of this rank."""
        self._count += 1
        write_row(self._memory, self._rank, row, self._count)
        if self._relay is not None:
            self._relay.turn()

    def bury(self, rank: int, updates: float | None = None) -> None:
        """Tell of another rank that it has died, after so many updates; None for those that it has told of."""
        row = read_rows(self._memory, [rank])[0]
        row = row._replace(state=State.DIED, speed=0.0, updates=row.updates if updates is None else updates)
        write_row(self._memory, rank, row, 0)

    def read(self) -> list[Row]:
        """All ranks' rows, as far as they are known here."""
        return read_rows(self._memory, range(self._size))

    def close(self) -> None:
        """Send what is on its way. Collective on several nodes."""
        if self._relay is not None:
            self._relay.close()
        os.close(self.descriptor)


class _Relay:
    """Between nodes: each first rank of a node has at most one message on its way to rank 0."""

    def __init__(self, comm: Any, members: list[list[int]], memory: mmap.mmap) -> None:
        self._comm, self._members, self._memory = comm, members, memory
        self._request: Any = None
        self._ended = 0

    def turn(self) -> None:
        """Send, or on rank 0 take what has come."""
        if self._comm.rank == 0:
            while self._comm.iprobe():
                self._take()
        elif self._request is None or self._request.Test():
            now = time.monotonic()
            rows = read_rows(self._memory, self._members[self._comm.rank])
            # Clocks of two nodes differ: the age is sent. Synchronous: done when rank 0 has taken it.
            self._request = self._comm.issend([row._replace(time=now - row.time) for row in rows], dest=0)

    def close(self) -> None:
        """Nothing is on its way any more."""
        backoff = Backoff()
        if self._comm.rank == 0:
            while self._ended < self._comm.size - 1:
                if self._comm.iprobe():
                    self._take()
                else:
                    backoff.pause()
        else:
            while self._request is not None and not self._request.Test():
                backoff.pause()
            self._comm.send(None, dest=0)
        self._comm.Free()

    def _take(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        rows = self._comm.recv(status=status)
        if rows is None:
            self._ended += 1
            return
        now = time.monotonic()
        for rank, row in zip(self._members[status.Get_source()], rows, strict=True):
            write_row(self._memory, rank, row._replace(time=now - row.time), 0)
