"""The store of one node: state and locks in shared-memory windows, locks by compare-and-swap."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hpcasync.comm.agree import raise_together
from hpcasync.comm.world import World
from hpcasync.errors import UsageError
from hpcasync.kernels.atomic import exchange, put, take
from hpcasync.rules import Rule
from hpcasync.store.base import NOTES, Store
from hpcasync.store.clocks import IDLE
from hpcasync.store.layout import Layout

LINE = 8
"""int64 words per cache line: each shard and each rank has a line of its own."""

LOCK, VERSION, WRITER, NOTE = 0, 1, 2, 3  # words of a shard's line; the notes go to its end
CLOCK, EXCUSED = 0, 1  # words of a rank's line


@dataclass(frozen=True)
class Torn:
    """A shard as a worker left it that died while it held the lock.

    Attributes:
        shard: its number.
        version: that it has from then on.
        state: float32 (1 + vectors, elements of the shard).
        notes: int64 (NOTES,), the rule's.
    """

    shard: int
    version: int
    state: np.ndarray
    notes: np.ndarray


class WindowStore(Store):
    """Shared state in windows of one node (``Win.Allocate_shared``). Constructor and ``close`` are collective.

    The first rank of the node holds the memory, all others map it. One ``Lock_all`` epoch lasts for the life of the
    window; a shard's lock is a word that holds its owner's rank + 1, taken by compare-and-swap. ``MPI_Win_lock`` is
    never used: it would wait until the holder of the memory enters MPI.

    Args:
        world: the ranks; all must be on one node.
        layout: where each parameter lies.
        rule: what a gradient does.
        threads: threads that work on a shard together.

    Raises:
        UsageError: several nodes; shared memory too small.
    """

    def __init__(self, world: World, layout: Layout, rule: Rule, *, threads: int = 1) -> None:
        from mpi4py import MPI

        if world.nodes > 1:
            raise UsageError(
                f"asynchronous mode on {world.nodes} nodes: the window spans one node in this version. "
                "Start all ranks on one node, or use the modes sync or kstep, which span nodes."
            )
        self._world = world
        self._open, self._outlives = True, False
        rule = rule.bind(world.size)
        shards, rows = len(layout.shards), 1 + len(rule.vectors)
        need = 4 * rows * layout.total + 8 * LINE * (shards + world.size)
        problem = _shared_memory_problem(need) if world.local_rank == 0 else None
        raise_together(world, problem)
        holds = world.local_rank == 0
        comm = world.node_comm
        self._data = MPI.Win.Allocate_shared(4 * rows * layout.total if holds else 0, 4, comm=comm)
        self._control = MPI.Win.Allocate_shared(8 * LINE * (shards + world.size) if holds else 0, 8, comm=comm)
        state = np.frombuffer(cast(Any, self._data.Shared_query(0)[0]), np.float32).reshape(rows, layout.total)
        words = np.frombuffer(cast(Any, self._control.Shared_query(0)[0]), np.int64).reshape(-1, LINE)
        for window in (self._data, self._control):
            window.Lock_all(MPI.MODE_NOCHECK)
        if holds:
            words[:] = 0
        self._words = words.reshape(-1)
        self._mine = world.local_rank + 1
        super().__init__(
            layout,
            rule,
            workers=world.size,
            state=state,
            versions=words[:shards, VERSION],
            writers=words[:shards, WRITER],
            clocks=words[shards:, CLOCK],
            excused=words[shards:, EXCUSED],
            notes=words[:shards, NOTE : NOTE + NOTES],
            threads=threads,
        )
        self.barrier()

    def publish(self, w: np.ndarray, *, keep_state: bool = False) -> None:
        if self._world.rank == 0:
            super().publish(w, keep_state=keep_state)
        self.barrier()

    def install(self, state: np.ndarray | None, versions: Sequence[int], notes: np.ndarray | None = None) -> None:
        if self._world.rank == 0:
            super().install(state, versions, notes)
        self.barrier()

    def barrier(self) -> None:
        self._data.Sync()
        self._control.Sync()
        self._world.collectives.barrier()
        self._data.Sync()
        self._control.Sync()

    def try_lock(self, shard: int, worker: int) -> bool:
        # The processor's own compare-and-swap: MPI's goes through a mutex of the window, which nobody opens after a death.
        return bool(take(self._words, LINE * shard + LOCK, self._mine))

    def unlock(self, shard: int, worker: int) -> None:
        put(self._words, LINE * shard + LOCK, 0)

    def bury(self, worker: int) -> list[Torn]:
        """Let the others go on without a worker whose process has ended: nobody waits for it, its locks are open.

        Returns:
            The shards that it held: their last update may have been applied in part. What there is of it counts as one.
        """
        if not self._open:  # the run is over: nobody waits for anything
            return []
        self.set_clock(worker, IDLE)
        found = []
        for k, shard in enumerate(self.layout.shards):
            if self._words[LINE * k + LOCK] == worker + 1:  # nobody else can have taken it since
                self.versions[k] += 1
                state = self.state[:, shard.start : shard.stop].copy()
                found.append(Torn(k, int(self.versions[k]), state, self.notes[k].copy()))
                exchange(self._words, LINE * k + LOCK, worker + 1, 0)
        return found

    def holders(self) -> list[int]:
        owners = self._words[: LINE * len(self.layout.shards) : LINE]
        return sorted({int(owner) - 1 for owner in owners if owner})

    def regroup(self, world: World) -> None:
        """Go on among these ranks, of which some may die: the window is left to the process's end, freeing is collective."""
        self._world, self._outlives = world, True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        super().close()
        if not self._outlives:
            self.barrier()
        empty = np.empty(0, np.int64)
        self._words = empty
        self.state = np.empty((1 + len(self.rule.vectors), 0), np.float32)
        self.versions = self.writers = self.clocks = self.excused = self.notes = empty
        for window in (self._data, self._control) if not self._outlives else ():
            window.Unlock_all()
            window.Free()


def _shared_memory_problem(need: int, folder: str = "/dev/shm") -> str | None:
    """Why a window of ``need`` bytes does not fit; MPICH would die with SIGBUS instead of saying so."""
    try:
        fs: Any = os.statvfs(folder)
    except (AttributeError, OSError):
        return None  # no such folder on this system: let MPI decide
    free = fs.f_bavail * fs.f_frsize
    if free >= need:
        return None
    return (
        f"{folder} has {free / 2**20:.0f} MiB free, the shared window needs {need / 2**20:.0f} MiB (parameters and "
        f"the rule's state). Enlarge it (mount -o remount,size=..., docker run --shm-size=...) or remove stale files in it."
    )
