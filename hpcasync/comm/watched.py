"""Collectives that leave signs of life: what a rank waits in is told before, and that it came back after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm.collectives import Buffer, Collectives, Pending
from hpcasync.comm.signs import BARRIER, BROADCAST, SUM, Signs


class _Watched:
    """A started operation."""

    def __init__(self, pending: Pending, signs: Signs, kind: int) -> None:
        self._pending, self._signs, self._kind = pending, signs, kind
        self.test = pending.test

    def wait(self) -> None:
        self._signs.within(self._kind, self._pending.wait)


class WatchedCollectives:
    """A backend, and signs of what this rank waits in.

    Args:
        inner: the backend.
        signs: where to leave them.
        kind: what all operations are called, one of ``hpcasync.comm.signs.KINDS``; None for what each is.
    """

    def __init__(self, inner: Collectives, signs: Signs, kind: int | None = None) -> None:
        self.inner, self.polite = inner, inner.polite
        self._signs = signs
        self._sum, self._broadcast, self._barrier = (kind or k for k in (SUM, BROADCAST, BARRIER))

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return self._signs.within(self._sum, self.inner.buffers, sizes, dtype, device)

    def allreduce(self, buffer: Buffer) -> None:
        self._signs.within(self._sum, self.inner.allreduce, buffer)

    def start_allreduce(self, buffer: Buffer) -> Pending:
        # Waits for the others too, where its line of operations is full.
        pending = self._signs.within(self._sum, self.inner.start_allreduce, buffer)
        return _Watched(pending, self._signs, self._sum)

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        self._signs.within(self._broadcast, self.inner.broadcast, buffer, root)

    def barrier(self) -> None:
        self._signs.within(self._barrier, self.inner.barrier)

    def start_barrier(self) -> Pending:
        return _Watched(self.inner.start_barrier(), self._signs, self._barrier)

    def close(self) -> None:
        self._signs.within(self._barrier, self.inner.close)
