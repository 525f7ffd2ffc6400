"""The window backend: inside a node the sum runs through shared memory, across nodes by slices over MPI.

Every rank has a row in shared memory, and all rows hold the same buffers at the same places. When all ranks of the node
have come to an operation, each sums its slice of all rows, in the order of the rows, and writes it into every row: one pass
at the memory's speed, in which each byte is read once and written once, and the same bits for everybody. Across nodes the
ranks with the same place on their nodes add their slices by MPI before they write them.

A rank's counters (operations it has come to, operations it has done its part of) lie in shared memory too. Nothing
moves but by the ranks' own calls of ``test()`` and ``wait()``; a rank that waits backs off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm.collectives.base import Buffer, OverMPI, Pending, as_array, segments, wait_until, warn_stalled
from hpcasync.comm.collectives.gpu import page_lock
from hpcasync.comm.collectives.mpi import MPICollectives
from hpcasync.comm.shared_memory import shared_rows
from hpcasync.comm.world import World
from hpcasync.kernels.rows import COUNTED, DEPTH, DESCRIBED, DESCRIPTION, DONE, LINE, announce, reached, sum_rows

ALIGN = 64
"""Bytes: no cache line belongs to two buffers or two slices."""

SLOT = 1 << 20
"""Bytes of a part of a buffer that lies outside the window and is copied in and out."""

SLOTS = 4
"""Such parts under way at a time."""

WHOLE = 1 << 14
"""Bytes that one rank alone sums: cutting less in slices costs more than it saves."""


def problem(world: World) -> str | None:
    """Always none: where ranks share no node each is a node of one."""
    return None


def open(world: World) -> WindowCollectives:  # the name that every backend gives it
    """The backend over all ranks. Collective."""
    return WindowCollectives(world)


class _Arena:
    """Rows of shared memory: one rank's buffers lie in its row."""

    def __init__(self, world: World, nbytes: int) -> None:
        self._rows = shared_rows(world, nbytes)
        self.mine = self._rows[world.local_rank]
        self.start = self.mine.ctypes.data
        self.stop = self.start + self.mine.nbytes

    def rows(self, dtype: np.dtype) -> np.ndarray:
        """All rows as arrays of ``dtype``."""
        return self._rows.view(dtype)


class _Sum:
    """One operation: columns ``[lo, hi)`` of an arena's rows.

    Attributes:
        rows: (local ranks, columns).
        lo: first column of this rank's slice.
        hi: past its last column.
        pending: the slices' sum across nodes.
        out: where the result has to be copied, and from where.
    """

    __slots__ = ("hi", "lo", "out", "pending", "rows")

    def __init__(self, rows: np.ndarray, lo: int, hi: int, out: tuple[np.ndarray, np.ndarray] | None) -> None:
        self.rows, self.lo, self.hi, self.out = rows, lo, hi, out
        self.pending: Pending | None = None


class _Place:
    """A place in the line of operations."""

    def __init__(self, window: WindowCollectives, number: int) -> None:
        self._window, self._number = window, number

    def wait(self) -> None:
        self._window.reach(self._number)

    def test(self) -> bool:
        return self._window.advance(self._number)


class WindowCollectives(OverMPI):
    """Sums through the node's shared memory. Constructor, ``buffers`` and ``close`` are collective.

    Args:
        world: the ranks.

    Raises:
        UsageError: shared memory too small.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world.collectives)
        self._world = world
        self._me = world.local_rank
        sizes = [size for rank, size in world.gather((world.local_rank, world.local_size)) if rank == 0]
        self._slices = min(sizes)
        self._across = self._join_slices() if world.nodes > 1 else None
        self._words = shared_rows(world, 8 * LINE).view(np.int64)
        self._scratch = _Arena(world, SLOTS * SLOT)
        self._arenas = [self._scratch]
        self._line: deque[_Sum] = deque()  # begun, and not known to be complete
        self._asked = self._summed = self._done = self._complete = self._staged = 0
        self._slot_free = [0] * SLOTS  # the operation that must be complete before a slot is used again
        for dtype in (np.float32, np.float64):
            sum_rows(np.zeros((2, 1), dtype), 0, 1, 0, 2)  # load or compile it now, so that no step pays for it
        self._advance()

    def _join_slices(self) -> MPICollectives | None:
        from mpi4py import MPI

        takes_part = self._me < self._slices
        comm = self._world.comm.Split(self._me if takes_part else MPI.UNDEFINED, self._world.rank)
        if not takes_part:
            return None
        collectives = MPICollectives(comm, polite=self.polite)
        comm.Free()
        return collectives

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        width = torch.empty(0, dtype=dtype).element_size()
        strides = [-(-size * width // ALIGN) * ALIGN for size in sizes]
        arena = _Arena(self._world, sum(strides))
        self._arenas.append(arena)
        row = torch.from_numpy(arena.mine)
        if device.type == "cuda":
            page_lock(arena.mine)
        starts = np.concatenate(([0], np.cumsum(strides)))
        return [row[a : a + size * width].view(dtype) for a, size in zip(starts.tolist(), sizes)]

    def start_allreduce(self, buffer: Buffer) -> Pending:
        array = as_array(buffer)
        address = array.ctypes.data
        for k, arena in enumerate(self._arenas):
            if arena.start <= address < arena.stop and array.nbytes:
                self._begin(k, address - arena.start, array, None)
                break
        else:
            for part in segments(array, SLOT):
                self._stage(part)
        return _Place(self, self._asked)

    def _stage(self, part: np.ndarray) -> None:
        """Begin the sum of a part of a buffer that lies elsewhere."""
        start = self._staged % SLOTS * SLOT
        self._staged += 1
        slot = self._scratch.mine[start : start + part.nbytes].view(part.dtype)
        self.reach(self._slot_free[start // SLOT])
        slot[:] = part
        self._begin(0, start, part, (part, slot))
        self._slot_free[start // SLOT] = self._asked

    def _begin(self, k: int, start: int, array: np.ndarray, out: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Put an operation into the line and tell the others."""
        self.reach(self._asked + 1 - DEPTH)
        first, size = start // array.itemsize, array.size
        lo, hi = self._slice(size, array.itemsize)
        self._line.append(_Sum(self._arenas[k].rows(array.dtype), first + lo, first + hi, out))
        place = DESCRIBED + self._asked % DEPTH * DESCRIPTION
        self._words[self._me, place : place + DESCRIPTION] = k, start, -size if array.itemsize == 8 else size
        self._asked += 1
        announce(self._words, self._me, COUNTED, self._asked)
        self._advance()

    def _slice(self, size: int, width: int) -> tuple[int, int]:
        """This rank's slice of a buffer."""
        slices = self._slices if size * width > WHOLE else 1
        if self._me >= slices:
            return 0, 0
        unit = ALIGN // width
        units = -(-size // unit)
        lo, hi = (units * (self._me + i) // slices * unit for i in (0, 1))
        return lo, min(hi, size)

    def reach(self, number: int) -> None:
        """Wait until so many operations are complete."""
        if not self.advance(number):
            wait_until(lambda: self.advance(number), self.polite)

    def advance(self, number: int) -> bool:
        """Do what can be done without waiting; whether so many operations are complete."""
        if self._complete < number:
            self._advance()
        return self._complete >= number

    def _advance(self) -> None:
        words, line = self._words, self._line
        while self._summed < self._asked and reached(words, COUNTED, self._summed + 1):
            self._sum(line[self._summed - self._complete])
            self._summed += 1
        begun = self._done
        while self._done < self._summed and self._spread(line[self._done - self._complete]):
            self._done += 1
        if self._done > begun:
            announce(words, self._me, DONE, self._done)
        while self._complete < self._done and reached(words, DONE, self._complete + 1):
            op = line.popleft()
            if op.out is not None:
                np.copyto(*op.out)
            self._complete += 1

    def _sum(self, op: _Sum) -> None:
        """This rank's slice of an operation to which all ranks of the node have come."""
        place = DESCRIBED + self._summed % DEPTH * DESCRIPTION
        described = self._words[:, place : place + DESCRIPTION]
        if (described != described[self._me]).any():
            raise RuntimeError(f"ranks disagree on a sum: each rank's (memory, start, size) is {described.tolist()}")
        if op.lo == op.hi:
            return
        if self._across is None:
            sum_rows(op.rows, op.lo, op.hi, 0, op.rows.shape[0])
        else:
            sum_rows(op.rows, op.lo, op.hi, self._me, self._me + 1)
            op.pending = self._across.start_allreduce(op.rows[self._me, op.lo : op.hi])

    def _spread(self, op: _Sum) -> bool:
        """Whether this rank's slice of the sum lies in every row."""
        if op.pending is not None:
            if not op.pending.test():
                return False
            slice_ = op.rows[:, op.lo : op.hi]
            for r in range(len(slice_)):
                if r != self._me:
                    slice_[r] = slice_[self._me]
        return True

    def barrier(self) -> None:
        pending = self._mpi.start_barrier()

        def passed() -> bool:
            self._advance()
            return pending.test()

        wait_until(passed, self.polite, lambda seconds: warn_stalled(self._world.rank, seconds))

    def close(self) -> None:
        """Complete what is under way and give the memory back as soon as no array lies in it. Collective and idempotent."""
        if self._arenas:
            self.reach(self._asked)
            self.barrier()
            self._arenas = []
            if self._across is not None:
                self._across.close()
