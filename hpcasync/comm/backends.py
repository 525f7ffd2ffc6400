"""The registry of collective backends: from a name to the object that sums."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hpcasync.comm.agree import raise_together
from hpcasync.comm.collectives import Collectives, OneRank
from hpcasync.comm.world import World
from hpcasync.errors import UsageError, unknown

BACKENDS = {
    "mpi": "hpcasync.comm.collectives.mpi",
    "window": "hpcasync.comm.collectives.window",
    "torch": "hpcasync.comm.collectives.torch_distributed",
    "horovod": "hpcasync.comm.collectives.horovod",
}
"""Where each backend lives. Its module has ``open(world)``, collective, and ``problem(world)``: why it can't run here."""


def check_backend(name: str) -> None:
    """Raise ``UsageError`` for a name that is not in the registry."""
    if name not in BACKENDS:
        raise unknown("collectives", str(name), BACKENDS)


def make_collectives(name: str, world: World) -> Collectives:
    """A new backend of this name over all ranks, for the caller to close; with one rank there is nothing to sum. Collective.

    Raises:
        UsageError: the same on every rank: an unknown name, or a backend that can't run here, with the remedy.
    """
    check_backend(name)
    module = importlib.import_module(BACKENDS[name])
    problem: Callable[[World], str | None] = module.problem
    raise_together(world, problem(world))
    if world.size == 1:
        return OneRank()
    return _opened(module, world)


def _opened(module: Any, world: World) -> Collectives:
    """What ``open`` gives; an error on some ranks is one on all."""
    found, problem = None, None
    try:
        found = module.open(world)
    except UsageError as error:
        problem = str(error)
    raise_together(world, problem)
    assert found is not None
    collectives: Collectives = found
    return collectives
