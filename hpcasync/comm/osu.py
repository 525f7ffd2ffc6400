"""Micro-benchmarks of allreduce and of one-sided operations, printed as the OSU suite does: size, latency, bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcasync.comm.agree import raise_together
from hpcasync.comm.backends import make_collectives
from hpcasync.comm.world import World
from hpcasync.errors import UsageError

BUDGET = 0.2
"""Seconds per size after which no more rounds are begun."""


def allreduce(world: World, backend: str, sizes: Sequence[int], rounds: int) -> None:
    """Time the sum of float32 buffers of these sizes (bytes). Collective; rank 0 prints.

    The bandwidth is the buffer's size over the latency, as an application sees it.
    """
    _check_memory(world, sizes)
    collectives = make_collectives(backend, world)
    _speak(world, f"# hpcasync allreduce, {backend}, {_where(world)}")
    for size in sizes:
        (buffer,) = collectives.buffers([max(1, size // 4)], torch.float32, torch.device("cpu"))
        _row(world, 4 * buffer.numel(), _time(world, lambda: collectives.allreduce(buffer), rounds))  # noqa: B023
    collectives.close()


def rma(world: World, sizes: Sequence[int], rounds: int) -> None:
    """Time put, get and fetch-and-op from the last rank to the memory of rank 0, each with its flush. Collective.

    Raises:
        UsageError: fewer than two ranks; sizes that do not fit into memory.
    """
    _check_memory(world, sizes)
    if world.size < 2:
        raise UsageError("bench rma needs at least 2 ranks: mpiexec -n 2 hpcasync bench rma")
    from mpi4py import MPI

    window = MPI.Win.Allocate(max(8, *sizes) if world.rank == 0 else 0, 1, comm=world.comm)
    window.Lock_all(MPI.MODE_NOCHECK)
    origin = np.ones(max(sizes), np.uint8)
    one, found = np.ones(1, np.int64), np.zeros(1, np.int64)

    def put(size: int) -> None:
        window.Put(origin[:size], 0)
        window.Flush(0)

    def get(size: int) -> None:
        window.Get(origin[:size], 0)
        window.Flush(0)

    def fetch_and_op(size: int) -> None:
        window.Fetch_and_op(one, found, 0, 0, MPI.SUM)
        window.Flush(0)

    operations: tuple[tuple[str, Callable[[int], None], Sequence[int]], ...] = (
        ("put + flush", put, sizes),
        ("get + flush", get, sizes),
        ("fetch-and-op + flush", fetch_and_op, [8]),
        ("flush", lambda size: window.Flush(0), [0]),
    )
    for name, operation, its_sizes in operations:
        _speak(world, f"# hpcasync {name}, rank {world.size - 1} to rank 0, {_where(world)}")
        for size in its_sizes:
            active = world.rank == world.size - 1
            # The target waits inside MPI, so that libraries without progress of their own can answer.
            _row(world, size, _time(world, lambda: operation(size) if active else None, rounds))  # noqa: B023
    window.Unlock_all()
    window.Free()


def _check_memory(world: World, sizes: Sequence[int]) -> None:
    """Raise ``UsageError`` on every rank if a node's ranks can't have a buffer of the largest size each, and a copy of it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    need, problem = 2 * max(sizes) * world.local_size, None
    if need > free:
        problem = (
            f"--sizes: {max(sizes)} bytes on {world.local_size} ranks of a node need {need / 2**30:,.1f} GiB with their copies, "
            f"{free / 2**30:,.1f} GiB are free; leave the largest out"
        )
    raise_together(world, problem)


def _time(world: World, work: Callable[[], Any], rounds: int) -> float:
    """The median over rounds of the slowest rank's seconds."""
    seconds: list[float] = []
    while len(seconds) < rounds + 2 and (len(seconds) < 5 or sum(seconds) < BUDGET):  # the same on every rank
        world.collectives.barrier()
        began = time.perf_counter()
        work()
        seconds.append(max(world.gather(time.perf_counter() - began)))
    return float(np.median(seconds[2:]))  # the first two warm up


def _where(world: World) -> str:
    return f"{world.size} ranks on {world.nodes} node{'s' * (world.nodes > 1)}, {world.library or 'without MPI'}"


def _speak(world: World, title: str) -> None:
    if world.rank == 0:
        print(f"{title}\n{'# Size':<12}{'    Latency (us)':>18}{'Bandwidth (MB/s)':>20}", flush=True)


def _row(world: World, size: int, seconds: float) -> None:
    if world.rank == 0:
        print(f"{size:<12}{1e6 * seconds:>18.2f}{size / seconds / 1e6:>20.2f}", flush=True)
