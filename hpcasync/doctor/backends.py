"""Which collective backends run here: each is opened and made to add."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import torch

from hpcasync.comm import BACKENDS, World, make_collectives
from hpcasync.doctor.line import Line, fail, ok, warn
from hpcasync.errors import UsageError


def check_backends(world: World) -> list[Line]:
    """A line per backend. Collective."""
    return [_check(world, name) for name in BACKENDS]


def _check(world: World, name: str) -> Line:
    check = f"collectives {name}"
    if name == "horovod" and importlib.util.find_spec("horovod") is None:
        return ok(check, "not installed (optional: hpcasync build-horovod)")
    problems = [p for p in world.gather(importlib.import_module(BACKENDS[name]).problem(world)) if p is not None]
    if problems:
        found, _, remedy = problems[0].removeprefix(f"--collectives {name}: ").partition("; ")
        return warn(check, found, remedy or "use --collectives mpi")
    try:
        collectives = make_collectives(name, world)
        (buffer,) = collectives.buffers([1000], torch.float32, torch.device("cpu"))
        buffer.fill_(world.rank + 1)
        collectives.allreduce(buffer)
        expected = world.size * (world.size + 1) / 2
        wrong = any(world.gather(not np.allclose(buffer.numpy(), expected)))
        collectives.close()
    except UsageError as error:
        return warn(check, str(error), "use --collectives mpi")
    if wrong:
        return fail(check, "sums are wrong", "use another backend, and please report it")
    return ok(check, _about(name))


def _about(name: str) -> str:
    text = "sums are right"
    if name == "torch":
        nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        return f"{text}; torch {torch.__version__}, gloo{', nccl' if nccl else ', no nccl'}"
    return text
