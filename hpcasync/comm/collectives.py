"""The collective operations that the synchronous modes need, and their mpi4py backend."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hpcasync.backoff import Backoff

SEGMENT = 1 << 20
"""Bytes per blocking MPI call: in 1 MB segments, which stay in the cache, a large allreduce takes half the time."""

LINE_SEGMENT = 8 << 20
"""Bytes per non-blocking MPI call: each costs more than a blocking one."""

IN_FLIGHT = 2
"""Non-blocking MPI calls under way at a time: many at once evict each other from the cache."""


SPIN_SECONDS = 0.05
"""How long a barrier holds its core where each rank has one: the others are seldom further behind."""

STALL_SECONDS = 60.0
"""After so long a barrier says that it still waits."""


class Pending(Protocol):
    """A started operation."""

    def wait(self) -> None:
        """Return when the result is there."""

    def test(self) -> bool:
        """Let the library make progress; whether the result is there."""


class Collectives(Protocol):
    """What a backend offers: sums in place over flat, contiguous float32 or float64 host buffers."""

    def allreduce(self, buffer: np.ndarray) -> None:
        """Replace ``buffer`` by its sum over the ranks."""

    def start_allreduce(self, buffer: np.ndarray) -> Pending:
        """Begin ``allreduce``; ``buffer`` must not be touched before ``wait()``. Same order on all ranks."""

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        """Replace ``buffer`` (any dtype) by the root's."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def start_barrier(self) -> Pending:
        """Begin ``barrier``."""


def check_buffer(buffer: np.ndarray) -> None:
    """Raise ``TypeError`` unless ``buffer`` is a flat, contiguous float32 or float64 array."""
    if buffer.dtype not in (np.float32, np.float64) or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise TypeError(
            f"allreduce of a {buffer.dtype} array of shape {buffer.shape}: expected a flat contiguous float32 or float64"
        )


class Done:
    """An operation that is complete."""

    def wait(self) -> None:
        pass

    def test(self) -> bool:
        return True


class OneRank:
    """The collectives of a world of one rank: every sum is its own term."""

    def allreduce(self, buffer: np.ndarray) -> None:
        check_buffer(buffer)

    def start_allreduce(self, buffer: np.ndarray) -> Pending:
        check_buffer(buffer)
        return Done()

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        pass

    def barrier(self) -> None:
        pass

    def start_barrier(self) -> Pending:
        return Done()


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
            backoff = Backoff()
            while not self.test():
                backoff.pause()
        else:
            self._request.Wait()

    def test(self) -> bool:
        return bool(self._request.Test())


class _Line:
    """Allreduces of segments, begun in the order they were asked for, at most ``IN_FLIGHT`` at a time.

    Args:
        begin: starts the allreduce of one segment and returns mpi4py's request.
        polite: give the core away while waiting.
    """

    def __init__(self, begin: Callable[[np.ndarray], Any], polite: bool) -> None:
        self._begin = begin
        self._polite = polite
        self._asked = self._done = 0
        self._waiting: deque[np.ndarray] = deque()
        self._flying: deque[_Request] = deque()

    def ask(self, segments: Sequence[np.ndarray]) -> int:
        """Put segments into the line; returns the number to ``reach`` for all of them."""
        self._waiting.extend(segments)
        self._asked += len(segments)
        self._fill()
        return self._asked

    def reached(self, number: int) -> bool:
        """Let the line advance without waiting; whether so many segments are done."""
        while self._done < number and self._flying and self._flying[0].test():
            self._land()
        return self._done >= number

    def reach(self, number: int) -> None:
        """Wait until so many segments are done."""
        while self._done < number:
            self._flying[0].wait()
            self._land()

    def _land(self) -> None:
        self._flying.popleft()
        self._done += 1
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._flying) < IN_FLIGHT:
            self._flying.append(_Request(self._begin(self._waiting.popleft()), self._polite))


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
            keeps the rank that everybody waits for from running.
    """

    def __init__(self, comm: Any, *, polite: bool = False) -> None:
        from mpi4py import MPI

        self._comm = comm.Dup()
        # A communicator of its own: the segments in the line begin later than they were asked for.
        sums = comm.Dup()
        self._line = _Line(lambda part: sums.Iallreduce(MPI.IN_PLACE, part, op=MPI.SUM), polite)
        self._polite = polite
        self._in_place, self._sum = MPI.IN_PLACE, MPI.SUM

    def allreduce(self, buffer: np.ndarray) -> None:
        if self._polite:
            self.start_allreduce(buffer).wait()
            return
        check_buffer(buffer)
        for part in _segments(buffer, SEGMENT):
            self._comm.Allreduce(self._in_place, part, op=self._sum)

    def start_allreduce(self, buffer: np.ndarray) -> Pending:
        check_buffer(buffer)
        return _Place(self._line, self._line.ask(_segments(buffer, LINE_SEGMENT)))

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        if not buffer.flags.c_contiguous:
            raise TypeError(f"broadcast of a strided array of shape {buffer.shape}: expected a contiguous one")
        for part in _segments(buffer.reshape(-1).view(np.uint8), SEGMENT):
            self._comm.Bcast(part, root=root)

    def barrier(self) -> None:
        pending = self.start_barrier()
        began = time.perf_counter()
        backoff = Backoff()
        stalled = False
        while not pending.test():
            waited = time.perf_counter() - began
            if self._polite or waited > SPIN_SECONDS:
                backoff.pause()
            if waited > STALL_SECONDS and not stalled:
                stalled = True
                warnings.warn(
                    f"rank {self._comm.rank} has waited {waited:.0f} s for the other ranks. In modes sync and kstep every rank "
                    "must take the same number of steps; hpcasync.data.loader and ShardSampler see to that.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def start_barrier(self) -> Pending:
        return _Request(self._comm.Ibarrier(), self._polite)


def _segments(buffer: np.ndarray, size: int) -> list[np.ndarray]:
    step = max(1, size // buffer.itemsize)
    return [buffer[i : i + step] for i in range(0, buffer.size, step)]
