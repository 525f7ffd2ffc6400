"""The collective operations that the synchronous modes need, and their mpi4py backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hpcasync.backoff import Backoff

SEGMENT = 1 << 20
"""Bytes per MPI call: large allreduces in 1 MB segments take half the time, since they stay in the cache."""


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


class _Requests:
    """Several MPI requests as one operation.

    Args:
        requests: mpi4py requests.
        polite: give the core away while waiting, for when there are more ranks than cores: MPI's own wait spins, and
            keeps the rank that everybody waits for from running.
        kept: a buffer that must outlive the operation.
    """

    def __init__(self, requests: Sequence[Any], polite: bool, kept: Any = None) -> None:
        self._requests = list(requests)
        self._polite = polite
        self._kept = kept

    def wait(self) -> None:
        if self._polite:
            backoff = Backoff()
            while not self.test():
                backoff.pause()
        else:
            for request in self._requests:
                request.Wait()

    def test(self) -> bool:
        while self._requests and self._requests[0].Test():
            self._requests.pop(0)
        return not self._requests


class MPICollectives:
    """Collectives over mpi4py, in place and in segments.

    Args:
        comm: mpi4py communicator; this object works on a duplicate of it.
        polite: give the core away while waiting.
    """

    def __init__(self, comm: Any, *, polite: bool = False) -> None:
        from mpi4py import MPI

        self._comm = comm.Dup()
        self._polite = polite
        self._in_place = MPI.IN_PLACE
        self._sum = MPI.SUM

    def allreduce(self, buffer: np.ndarray) -> None:
        check_buffer(buffer)
        if self._polite:
            self.start_allreduce(buffer).wait()
            return
        for part in _segments(buffer):
            self._comm.Allreduce(self._in_place, part, op=self._sum)

    def start_allreduce(self, buffer: np.ndarray) -> Pending:
        check_buffer(buffer)
        started = [self._comm.Iallreduce(self._in_place, part, op=self._sum) for part in _segments(buffer)]
        return _Requests(started, self._polite, buffer)

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        if not buffer.flags.c_contiguous:
            raise TypeError(f"broadcast of a strided array of shape {buffer.shape}: expected a contiguous one")
        for part in _segments(buffer.reshape(-1).view(np.uint8)):
            self._comm.Bcast(part, root=root)

    def barrier(self) -> None:
        self.start_barrier().wait()

    def start_barrier(self) -> Pending:
        return _Requests([self._comm.Ibarrier()], self._polite)


def _segments(buffer: np.ndarray) -> list[np.ndarray]:
    step = max(1, SEGMENT // buffer.itemsize)
    return [buffer[i : i + step] for i in range(0, buffer.size, step)]
