"""MPI's one-sided side: which windows work, and whether they wait for a busy target."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcasync.comm import World
from hpcasync.doctor.line import Line, fail, ok, warn

BUSY_SECONDS = 0.3
"""How long the target stays out of MPI."""

PASSIVE_SECONDS = BUSY_SECONDS / 4
"""Operations that take longer have waited for it."""

TRIES = 3
"""The quickest of so many counts: on a busy machine an operation may be slow for another reason."""

WORDS = 8


def check_windows(world: World) -> list[Line]:
    """Make every kind of window, use it, and time it against a busy target on this node and on another one. Collective."""
    if world.size == 1:
        found = "not tried: one rank"
        return [
            warn("windows", found, "mpiexec -n 2 hpcasync doctor"),
            warn("passive progress", found, "mpiexec -n 2 hpcasync doctor"),
        ]
    from mpi4py import MPI

    makers: dict[str, tuple[Callable[[Any], tuple[Any, int]], bool]] = {
        "allocate": (lambda comm: (MPI.Win.Allocate(8 * WORDS, 1, comm=comm), 0), True),
        "allocate-shared": (lambda comm: (MPI.Win.Allocate_shared(8 * WORDS, 1, comm=comm), 0), False),
        "create": (lambda comm: (MPI.Win.Create(np.zeros(WORDS, np.int64), 1, comm=comm), 0), True),
        "create-dynamic": (_dynamic, True),
    }
    nodes = world.gather(world.node)
    mine = [r for r, node in enumerate(nodes) if node == nodes[0]]
    inside, outside = len(mine) > 1, world.nodes > 1
    timed: dict[tuple[str, str], float] = {}
    broken: dict[str, str] = {}
    for kind, (make, spans) in makers.items():
        for scope, origin, wanted in (("node", 1, inside), ("network", nodes.index(1) if outside else 0, outside and spans)):
            if not wanted:
                continue
            # Only node 0 takes part inside a node, so that no other one waits for nothing.
            comm = world.comm if scope == "network" else world.node_comm
            seconds, problem = 0.0, None
            if scope == "network" or world.node == 0:
                try:
                    seconds = _probe(make, comm, origin)
                except (MPI.Exception, AssertionError) as error:
                    problem = str(error) or type(error).__name__
            problems = [p for p in world.gather(problem) if p is not None]
            if problems:
                broken[kind] = problems[0]
            timed[kind, scope] = max(world.gather(seconds))
    return [_kinds(makers, broken), *_progress(timed, inside, outside)]


def _kinds(makers: dict[str, Any], broken: dict[str, str]) -> Line:
    good = [kind for kind in makers if kind not in broken]
    found = f"{', '.join(good) or 'none'} work"
    if not broken:
        return ok("windows", found)
    text = f"{found}; not {', '.join(f'{k} ({why})' for k, why in broken.items())}"
    needed = {"allocate-shared", "create"} & set(broken)
    remedy = "another MPI library; modes sync and kstep need no windows"
    return fail("windows", text, remedy) if needed else warn("windows", text, "hpcasync does not use those; for others " + remedy)


def _progress(timed: dict[tuple[str, str], float], inside: bool, outside: bool) -> list[Line]:
    def show(scope: str) -> str:
        return ", ".join(f"{kind} {1e3 * seconds:.2f} ms" for (kind, where), seconds in timed.items() if where == scope)

    lines = []
    if inside:
        name, found = "passive progress in a node", show("node")
        if timed["allocate-shared", "node"] > PASSIVE_SECONDS:
            remedy = "pushes wait until others enter MPI: use another MPI library for mode async"
            lines.append(warn(name, f"{found} against a target busy for {1e3 * BUSY_SECONDS:.0f} ms", remedy))
        else:
            lines.append(ok(name, found))
    if outside:
        name, found = "passive progress between nodes", show("network")
        helped = timed["create", "network"] > PASSIVE_SECONDS
        how = "--progress thread, the default here, answers for a busy rank" if helped else "the library needs no help"
        lines.append(ok(name, f"{found} against a target busy for {1e3 * BUSY_SECONDS:.0f} ms: {how}"))
    return lines


def _dynamic(comm: Any) -> tuple[Any, int]:
    """A dynamic window and the address of rank 0's memory in it."""
    from mpi4py import MPI

    window = MPI.Win.Create_dynamic(comm=comm)
    memory = MPI.Alloc_mem(8 * WORDS)
    window.Attach(memory)
    return window, int(comm.bcast(MPI.Get_address(memory)))


def _probe(make: Callable[[Any], tuple[Any, int]], comm: Any, origin: int) -> float:
    """Seconds of a put, a get and an atomic operation on rank 0 while it is busy, on rank ``origin``; checks what they do."""
    from mpi4py import MPI

    window, base = make(comm)
    window.Lock_all(MPI.MODE_NOCHECK)
    value, found, one = np.full(1, 7, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    at = base + 8 * (WORDS - 1)

    def use() -> float:
        began = time.perf_counter()
        window.Put((value, MPI.INT64_T), 0, (at, 1, MPI.INT64_T))
        window.Flush(0)
        window.Fetch_and_op((one, MPI.INT64_T), (found, MPI.INT64_T), 0, at, MPI.SUM)
        window.Flush(0)
        assert found[0] == 7, f"fetch-and-op found {found[0]}, 7 was put"
        window.Get((found, MPI.INT64_T), 0, (at, 1, MPI.INT64_T))
        window.Flush(0)
        assert found[0] == 8, f"get found {found[0]} after 7 + 1"
        return time.perf_counter() - began

    seconds: list[float] = []
    comm.Barrier()
    if comm.rank == origin:
        use()  # the first operations set the connection up
    for _ in range(TRIES):
        comm.Barrier()
        if comm.rank == 0:
            time.sleep(BUSY_SECONDS)
        elif comm.rank == origin:
            time.sleep(BUSY_SECONDS / 6)
            seconds.append(use())
        if comm.bcast(bool(seconds) and min(seconds) <= PASSIVE_SECONDS, root=origin):
            break
    window.Unlock_all()
    window.Free()
    return min(seconds, default=0.0)
