"""Collectives over a `Star`: small ones, between ranks that outlive each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm.collectives.base import Buffer, Done, Pending, as_array, host_buffers
from hpcasync.comm.star import Star


class OverStar:
    """`Collectives` whose every operation may raise `RankDied`; they are complete when they return.

    Args:
        star: the ranks.
    """

    polite = True

    def __init__(self, star: Star) -> None:
        self._star = star

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return host_buffers(sizes, dtype, device)

    def allreduce(self, buffer: Buffer) -> None:
        self._star.sum(as_array(buffer))

    def start_allreduce(self, buffer: Buffer) -> Pending:
        self.allreduce(buffer)
        return Done()

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> None:
        buffer[...] = self._star.bcast(buffer, root)

    def barrier(self) -> None:
        self._star.Barrier()

    def start_barrier(self) -> Pending:
        self.barrier()
        return Done()

    def close(self) -> None:
        pass
