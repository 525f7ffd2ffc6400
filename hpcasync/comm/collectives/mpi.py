"""The mpi4py backend: allreduce in place, in segments."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm.collectives.base import Buffer, Pending, as_array, host_buffers, segments, wait_until, warn_stalled

if TYPE_CHECKING:  # World holds collectives
    from hpcasync.comm.world import World

SEGMENT = 1 << 20
"""Bytes per blocking MPI call: in 1 MB segments, which stay in the cache, a large allreduce takes half the time."""

LINE_SEGMENT = 8 << 20
"""Bytes per non-blocking MPI call: each costs more than a blocking one."""

SMALL = 1 << 16
"""Bytes up to which a sum is a message or two: where waiting is polite it needs no barrier before it."""

IN_FLIGHT = 2
"""Non-blocking MPI calls under way at a time: many at once evict each other from the cache."""


def problem(world: World) -> str | None:
    """Always none: where there are several ranks there is MPI."""
    return None


def open(world: World) -> MPICollectives:  # the name that every backend gives it
    """The backend over all ranks, on communicators of its own. Collective."""
    return MPICollectives(world.comm, polite=world.collectives.polite)


class _Request:
    """One MPI request.

    Args:
        request: of mpi4py.
        polite: give the core away while waiting.
    """

    def __init__(self, request: Any, polite: bool) -> None:
        self._request = request
        self._polite = polite

    def wait(self) -> None:
        if self._polite:
            wait_until(self.test, True)
        else:
            self._request.Wait()

    def test(self) -> bool:
        return bool(self._request.Test())


class _Line:
    """Allreduces of segments, begun in the order they were asked for, at most ``IN_FLIGHT`` at a time.

    A large sum takes many looks at it, each of which moves a part: sleeping between them would cost far more than the sum. So
    who waits politely sleeps only as long as some rank may be missing.

    Args:
        begin: starts the allreduce of one segment and returns mpi4py's request.
        polite: give the core away while waiting.

    Attributes:
        asked: so many segments have been put into the line.
        together: so many segments all ranks have asked for: they are waited for without sleeping.
    """

    def __init__(self, begin: Callable[[np.ndarray], Any], polite: bool) -> None:
        self._begin = begin
        self._polite = polite
        self.asked = self._done = 0
        self._waiting: deque[np.ndarray] = deque()
        self._flying: deque[Any] = deque()
        self.together = 0

    def ask(self, segments: Sequence[np.ndarray]) -> int:
        """Put segments into the line; returns the number to ``reach`` for all of them."""
        self._waiting.extend(segments)
        self.asked += len(segments)
        self._fill()
        return self.asked

    def reached(self, number: int) -> bool:
        """Let the line advance without waiting; whether so many segments are done."""
        while self._done < number and self._flying and self._flying[0].Test():
            self._land()
        return self._done >= number

    def reach(self, number: int) -> None:
        """Wait until so many segments are done."""
        while self._done < number:
            request = self._flying[0]
            if not self._polite:
                request.Wait()
            elif self._done >= self.together:
                wait_until(request.Test, True)
            else:
                while not request.Test():
                    time.sleep(0)  # whose turn it is may move it on
            self._land()

    def _land(self) -> None:
        self._flying.popleft()
        self._done += 1
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._flying) < IN_FLIGHT:
            self._flying.append(self._begin(self._waiting.popleft()))


class _Place:
    """A place in the line: one allreduce."""

    def __init__(self, line: _Line, number: int) -> None:
        self._line, self._number = line, number

    def wait(self) -> None:
        self._line.reach(self._number)

    def test(self) -> bool:
        return self._line.reached(self._number)


class MPICollectives:
    """Collectives over mpi4py, in place and in segments.

    Args:
        comm: mpi4py communicator; this object works on duplicates of it.
        polite: give the core away while waiting, for when there are more ranks than cores: MPI's own wait spins, and
            keeps the rank that everybody waits for from running. If one rank is to, all are: they make the same MPI calls.
    """

    def __init__(self, comm: Any, *, polite: bool = False) -> None:
        from mpi4py import MPI

        self.polite = polite = bool(comm.allreduce(polite, op=MPI.LOR))
        self._comm = comm.Dup()
        # A communicator of its own: the segments in the line begin later than they were asked for.
        self._sums = comm.Dup()
        self._line = _Line(lambda part: self._sums.Iallreduce(MPI.IN_PLACE, part, op=MPI.SUM), polite)
        self._in_place, self._sum = MPI.IN_PLACE, MPI.SUM

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return host_buffers(sizes, dtype, device)

    def allreduce(self, buffer: Buffer) -> None:
        array = as_array(buffer)
        if not self.polite:
            for part in segments(array, SEGMENT):
                self._comm.Allreduce(self._in_place, part, op=self._sum)
            return
        pending = self.start_allreduce(array)
        if array.nbytes > SMALL:
            self.barrier()
        pending.wait()

    def start_allreduce(self, buffer: Buffer) -> Pending:
        return _Place(self._line, self._line.ask(segments(as_array(buffer), LINE_SEGMENT)))

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        if not buffer.flags.c_contiguous:
            raise TypeError(f"broadcast of a strided array of shape {buffer.shape}: expected a contiguous one")
        for part in segments(buffer.reshape(-1).view(np.uint8), SEGMENT):
            self._comm.Bcast(part, root=root)

    def barrier(self) -> None:
        rank, asked = self._comm.rank, self._line.asked
        wait_until(self.start_barrier().test, self.polite, lambda seconds: warn_stalled(rank, seconds))
        self._line.together = max(asked, self._line.together)  # by all ranks: they ask in the same order

    def start_barrier(self) -> Pending:
        return _Request(self._comm.Ibarrier(), self.polite)

    def close(self) -> None:
        """Free the communicators. Collective and idempotent."""
        for comm in (self._comm, self._sums):
            if comm:
                comm.Free()
