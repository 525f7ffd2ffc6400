"""The store in one process, without MPI: for one rank, for tests and for the simulator."""

from __future__ import annotations

import threading

import numpy as np

from hpcasync.rules import Rule
from hpcasync.store.base import NOTES, Store
from hpcasync.store.layout import Layout


class LocalStore(Store):
    """Shared state in private memory; the workers may be turns in one thread, or threads.

    Args:
        layout: where each parameter lies.
        rule: what a gradient does.
        workers: number of workers.
        threads: threads that work on a shard together.
    """

    def __init__(self, layout: Layout, rule: Rule, *, workers: int = 1, threads: int = 1) -> None:
        shards = len(layout.shards)
        rule = rule.bind(workers)
        super().__init__(
            layout,
            rule,
            workers=workers,
            state=aligned_zeros(1 + len(rule.vectors), layout.total),
            versions=np.zeros(shards, np.int64),
            writers=np.full(shards, -1, np.int64),
            clocks=np.zeros(workers, np.int64),
            excused=np.zeros(workers, np.int64),
            notes=np.zeros((shards, NOTES), np.int64),
            threads=threads,
        )
        self._locks = [threading.Lock() for _ in range(shards)]

    def try_lock(self, shard: int, worker: int) -> bool:
        return self._locks[shard].acquire(blocking=False)

    def unlock(self, shard: int, worker: int) -> None:
        self._locks[shard].release()


def aligned_zeros(rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    """Zeros of shape (rows, columns) that start on a 64-byte boundary."""
    size = rows * columns * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(rows, columns)
