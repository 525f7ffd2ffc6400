"""Which way of progress between nodes: what was asked for, or what a probe of the MPI library finds."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from hpcasync.comm.world import World
from hpcasync.errors import UsageError, unknown

PROGRESS = ("thread", "host-rank", "library")

BUSY_SECONDS = 0.4
"""How long the probe's target stays out of MPI."""


def chosen_progress(world: World, asked: str | None) -> str | None:
    """One of ``PROGRESS``; None on one node, where nothing needs it. Collective.

    Without a wish it is found out, and rank 0 says what was found.

    Raises:
        UsageError: an unknown name, or one that does not fit the ranks.
    """
    if asked is not None and asked not in PROGRESS:
        raise unknown("progress", str(asked), PROGRESS)
    if (asked == "host-rank") != (world.hosts is not None) and (asked is not None or world.nodes == 1):
        raise UsageError(
            f"progress={asked!r} with {'no ' if world.hosts is None else ''}host ranks: host ranks are set aside by "
            "hpcasync.init(host_ranks=N) (on the command line --progress host-rank --host-ranks N), and only for that"
        )
    if world.nodes == 1:
        return None
    if asked is not None:
        return asked
    if world.hosts is not None:
        return "host-rank"
    seconds = busy_seconds(world)
    found = "library" if seconds < BUSY_SECONDS / 4 else "thread"
    if world.rank == 0:
        print(
            f"hpcasync: progress between the {world.nodes} nodes: {found} (a put and a get on a rank that was busy for "
            f"{BUSY_SECONDS} s took {seconds:.3f} s)",
            file=sys.stderr,
            flush=True,
        )
    return found


def busy_seconds(world: World) -> float:
    """Seconds that a put and a get take on a rank of another node that is out of MPI. Collective."""
    from mpi4py import MPI

    memory = np.zeros(16, np.int64)
    window = MPI.Win.Create(memory, 1, comm=world.comm)
    window.Lock_all(MPI.MODE_NOCHECK)
    target = 0
    origin = next(rank for rank, node in enumerate(world.gather(world.node)) if node != 0)
    seconds = 0.0
    word = np.zeros(1, np.int64)
    if world.rank == origin:  # the first operations set the connection up
        _put_and_get(window, target, word)
    world.collectives.barrier()
    if world.rank == target:
        time.sleep(BUSY_SECONDS)
    elif world.rank == origin:
        time.sleep(BUSY_SECONDS / 8)
        began = time.perf_counter()
        _put_and_get(window, target, word)
        seconds = time.perf_counter() - began
    seconds = max(world.gather(seconds))
    window.Unlock_all()
    window.Free()
    return seconds


def _put_and_get(window: Any, target: int, word: np.ndarray) -> None:
    from mpi4py import MPI

    window.Put((word, MPI.INT64_T), target, (0, 1, MPI.INT64_T))
    window.Flush(target)
    window.Get((word, MPI.INT64_T), target, (64, 1, MPI.INT64_T))
    window.Flush(target)
