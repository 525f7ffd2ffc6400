"""A model whose ranks die where the variable DEATHS says: a JSON object of a place and a count by the rank's number."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hpcasync.modes import asynchronous
from hpcasync.modes.recorder import Event
from hpcasync.rules import Rule
from hpcasync.store import Store, WindowStore
from hpcasync.train.record import Record
from tests.replay import nets

RANK = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", ""))
pushing: list[bool] = []  # whether a shard is being pushed now
pushed: list[int] = []  # shards that have been


def norm(shape: Sequence[int], classes: int) -> nn.Module:
    """With BatchNorm and dropout."""
    return nets.norm(shape, classes)


def die_in(owner: Any, name: str, count: int, last: Callable[..., Any], when: Callable[..., bool]) -> None:
    """Let a method end the process after ``last``, which is given it, in its call ``count`` of those that ``when`` holds for."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when(*args) and next(calls) == count:
            last(real, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def always(*args: Any) -> bool:
    return True


def nothing(real: Any, *args: Any, **kwargs: Any) -> None:
    """Die before it."""


def whole(real: Any, *args: Any, **kwargs: Any) -> None:
    """Die after it."""
    real(*args, **kwargs)


def half(real: Any, rule: Rule, state: Any, start: int, grad: Any, out: Any, *args: Any, **kwargs: Any) -> None:
    """Die with half of the elements updated."""
    n = len(grad) // 2
    real(rule, state, start, grad[:n], out[:n], *args, **kwargs)


def watch_pushes() -> None:
    """Keep ``pushing`` and ``pushed``."""
    real = Store._push_shard

    def watched(*args: Any) -> int:
        pushing.append(True)
        tau = real(*args)
        pushing.clear()
        pushed.append(1)
        return tau

    Store._push_shard = watched  # type: ignore[assignment, method-assign]


def dies(place: str, count: int) -> None:
    """Die at the place: before a step, after so many pushed shards, inside of an update, or in a meeting."""
    watch_pushes()
    if place == "step":
        die_in(asynchronous.Async, "step", count, nothing, always)
    elif place == "shard":
        die_in(WindowStore, "unlock", 1, whole, lambda *_: len(pushed) == count)
    elif place == "update":
        die_in(Rule, "update", count, half, lambda *_: bool(pushing))
    elif place == "uncounted":  # the version is set, the record does not know it yet, the lock is held
        die_in(Record, "_wrote", count, nothing, always)
    elif place == "averaged":  # in a meeting, after the averages of the buffers
        die_in(asynchronous.Async, "_synchronize_buffers", count, whole, always)
    else:  # after a meeting, before it has recorded that it was there
        die_in(Record, "event", count, nothing, lambda _, kind, *rest: kind == Event.SYNC)


if "DEATHS" in os.environ:
    asynchronous.SHARD_ELEMENTS = 512
    deaths = json.loads(os.environ["DEATHS"])
    if RANK in deaths:
        dies(*deaths[RANK])
