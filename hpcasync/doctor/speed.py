"""Whether pushes are exact, and how fast memory moves: the real store, on the real ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from hpcasync.comm import World
from hpcasync.doctor.line import Line, fail, ok, warn
from hpcasync.modes import Async
from hpcasync.rules import ASGD, Rule
from hpcasync.store import LocalStore, make_layout

PUSHES, ELEMENTS = 40, 1 << 21
ROUNDS, NBYTES = 5, 64 << 20


def check_updates(world: World, rule: Rule | None = None) -> list[Line]:
    """Every push adds exactly 1 to every parameter: count them, and look for reads of two versions in one shard. Collective.

    Args:
        world: the ranks.
        rule: how a push is applied; plain SGD of learning rate 1.
    """
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS, device=world.device))
    optimizer = Async([parameter], rule or ASGD(lr=1.0), world=world)
    bounds = [(s.start, s.stop) for s in optimizer.store.layout.shards]
    parameter.grad = -torch.ones_like(parameter)
    torn = 0
    for _ in range(PUSHES):
        optimizer.step()
        seen = parameter.detach().cpu().numpy()
        torn += sum(bool(np.ptp(seen[a:b])) for a, b in bounds if a < ELEMENTS)
    optimizer.synchronize()
    seen, pushes = parameter.detach().cpu().numpy().copy(), PUSHES * world.size
    optimizer.close()
    lost = max(world.gather(float(np.abs(seen - pushes).max())))
    torn = sum(world.gather(torn))
    found = f"{pushes} pushes of {world.size} rank{'s' * (world.size > 1)} through the store, {len(bounds)} shards"
    remedy = "do not train in mode async here; please report it, with the output of hpcasync doctor --json"
    lines = [ok("lost updates", f"none in {found}") if not lost else fail("lost updates", f"{lost:.0f} of {found}", remedy)]
    return [*lines, ok("torn reads", f"none in {found}") if not torn else fail("torn reads", f"{torn} in {found}", remedy)]


def check_bandwidth(world: World) -> list[Line]:
    """Put and get to the farthest rank, the push's kernel and a plain copy on all ranks at once. Collective."""
    a, b = np.ones(NBYTES // 4, np.float32), np.zeros(NBYTES // 4, np.float32)
    copy = _gigabytes(world, 2 * NBYTES, lambda: np.copyto(b, a))
    rule = ASGD(lr=0.1).bind(1)
    store = LocalStore(make_layout([a.size]), rule)
    worker, hyper = store.worker(0), rule.hyper(rule.group_options())
    # Reads the gradient and w, writes w; the model is the store's own w, as with one rank.
    kernel = _gigabytes(world, 3 * NBYTES, lambda: store.push_pull(worker, [a], store.state[0], [hyper]))
    found = f"copy {copy:.1f}, kernel {kernel:.1f} GB/s on {world.size} rank{'s' * (world.size > 1)} at once (the slowest)"
    if world.size > 1:
        found += f"; put {_put_get(world, a, 'put'):.1f}, get {_put_get(world, a, 'get'):.1f} GB/s"
        found += f" from rank {world.size - 1} to rank 0, on {'another' if world.nodes > 1 else 'the same'} node"
    if kernel < copy / 3:
        return [
            warn("bandwidth", found, "the kernel should come near the copy: look at numba's version and the CPU it compiles for")
        ]
    return [ok("bandwidth", found)]


def _put_get(world: World, buffer: np.ndarray, which: str) -> float:
    """GB/s between the last rank and rank 0, which waits inside MPI."""
    from mpi4py import MPI

    window = MPI.Win.Allocate(buffer.nbytes if world.rank == 0 else 0, 1, comm=world.comm)
    window.Lock_all(MPI.MODE_NOCHECK)
    target = (0, buffer.size, MPI.FLOAT)

    def move() -> None:
        if world.rank == world.size - 1:
            (window.Put if which == "put" else window.Get)((buffer, MPI.FLOAT), 0, target)
            window.Flush(0)

    speed = _gigabytes(world, buffer.nbytes, move)
    window.Unlock_all()
    window.Free()
    return speed


def _gigabytes(world: World, nbytes: int, work: Callable[[], object]) -> float:
    """GB/s of the slowest rank, in the best of some rounds. Collective."""
    times = []
    for _ in range(ROUNDS):
        world.collectives.barrier()
        began = time.perf_counter()
        work()
        times.append(max(world.gather(time.perf_counter() - began)))
    return nbytes / min(times[1:]) / 1e9
