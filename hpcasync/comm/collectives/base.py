"""What a collective backend offers, and what the backends share: checks, waiting, a world of one rank."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hpcasync.backoff import Backoff

SPIN_SECONDS = 0.05
"""How long a wait holds its core where each rank has one: the others are seldom further behind."""

STALL_SECONDS = 60.0
"""After so long a barrier says that it still waits."""

Buffer = np.ndarray | Tensor
"""A flat, contiguous float32 or float64 array, or tensor of which one shares the memory."""


class Pending(Protocol):
    """A started operation."""

    def wait(self) -> None:
        """Return when the result is there."""

    def test(self) -> bool:
        """Let the backend make progress; whether the result is there."""


class Collectives(Protocol):
    """What a backend offers: sums in place over flat, contiguous float32 or float64 buffers.

    Every rank must start the same operations in the same order, and waits for them in any order. The sum has the same
    bits on every rank.

    Attributes:
        polite: it gives the core away while it waits.
    """

    polite: bool

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Zeros of these sizes, where this backend sums them best: for gradients or parameters on ``device``. Collective.

        They lie in host memory (pinned for a GPU) unless the backend sums on the GPU itself.
        """

    def allreduce(self, buffer: Buffer) -> None:
        """Replace ``buffer`` by its sum over the ranks."""

    def start_allreduce(self, buffer: Buffer) -> Pending:
        """Begin ``allreduce``; ``buffer`` must not be touched before ``wait()``."""

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        """Replace ``buffer`` (any dtype) by the root's."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def start_barrier(self) -> Pending:
        """Begin ``barrier``."""

    def close(self) -> None:
        """Give back what the backend holds; buffers stay valid memory. Collective and idempotent."""


def as_array(buffer: Buffer) -> np.ndarray:
    """``buffer`` as a host array.

    Raises:
        TypeError: not flat, not contiguous, another dtype, or on a GPU.
    """
    if isinstance(buffer, Tensor):
        if buffer.device.type != "cpu":
            raise TypeError(f"allreduce of a tensor on {buffer.device}: this backend sums in host memory")
        buffer = buffer.detach().numpy()
    if buffer.dtype not in (np.float32, np.float64) or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise TypeError(
            f"allreduce of a {buffer.dtype} array of shape {buffer.shape}: expected a flat contiguous float32 or float64"
        )
    return buffer


def host_buffers(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeros in host memory, pinned where they are to meet a GPU."""
    return [torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda") for size in sizes]


def segments(buffer: np.ndarray, size: int) -> list[np.ndarray]:
    """``buffer`` in parts of at most ``size`` bytes."""
    step = max(1, size // buffer.itemsize)
    return [buffer[i : i + step] for i in range(0, buffer.size, step)]


def wait_until(ready: Callable[[], bool], polite: bool, stalled: Callable[[float], None] | None = None) -> None:
    """Poll until ``ready()``.

    Args:
        ready: lets the operation advance; whether it is complete.
        polite: give the core away from the start, for when there are more ranks than cores: the one that everybody waits
            for may need it.
        stalled: told once, after ``STALL_SECONDS``, for how long.
    """
    began = time.perf_counter()
    backoff = Backoff()
    while not ready():
        waited = time.perf_counter() - began
        if polite or waited > SPIN_SECONDS:
            backoff.pause()
        if stalled is not None and waited > STALL_SECONDS:
            stalled(waited)
            stalled = None


def warn_stalled(rank: int, seconds: float) -> None:
    """Say that this rank still waits for the others."""
    warnings.warn(
        f"rank {rank} has waited {seconds:.0f} s for the other ranks. In modes sync and kstep every rank "
        "must take the same number of steps; hpcasync.data.loader and ShardSampler see to that.",
        RuntimeWarning,
        stacklevel=3,
    )


class Done:
    """An operation that is complete."""

    def wait(self) -> None:
        pass

    def test(self) -> bool:
        return True


class OneRank:
    """The collectives of a world of one rank: every sum is its own term."""

    polite = False

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return host_buffers(sizes, dtype, device)

    def allreduce(self, buffer: Buffer) -> None:
        as_array(buffer)

    def start_allreduce(self, buffer: Buffer) -> Pending:
        as_array(buffer)
        return Done()

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        pass

    def barrier(self) -> None:
        pass

    def start_barrier(self) -> Pending:
        return Done()

    def close(self) -> None:
        pass


class OverMPI:
    """Base of the backends that only sum: broadcast and barrier are MPI's.

    Args:
        mpi: the world's own collectives.
    """

    def __init__(self, mpi: Collectives) -> None:
        self._mpi = mpi
        self.polite = mpi.polite

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return host_buffers(sizes, dtype, device)

    def allreduce(self, buffer: Buffer) -> None:
        self.start_allreduce(buffer).wait()

    def start_allreduce(self, buffer: Buffer) -> Pending:
        raise NotImplementedError

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        self._mpi.broadcast(buffer, root)

    def barrier(self) -> None:
        self._mpi.barrier()

    def start_barrier(self) -> Pending:
        return self._mpi.start_barrier()

    def close(self) -> None:
        pass
