"""Checks that every rank has the same thing, so that a mismatch is an error by name and not a hang later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hpcasync.comm.world import World
from hpcasync.errors import UsageError

T = TypeVar("T")


def agree(world: World, facts: Mapping[str, Any]) -> None:
    """Raise the same ``UsageError`` on every rank unless all ranks have equal ``facts``. Collective.

    Args:
        world: the ranks that must agree.
        facts: what to compare, by name; values must be picklable and comparable.
    """
    everyone = world.gather(dict(facts))
    for name in dict.fromkeys(n for theirs in everyone for n in theirs):
        odd = [r for r, theirs in enumerate(everyone) if theirs.get(name) != everyone[0].get(name)]
        if odd:
            raise UsageError(
                f"ranks disagree on {name}: rank 0 has {_short(everyone[0].get(name))}, rank {odd[0]} has "
                f"{_short(everyone[odd[0]].get(name))}; {_ranks(odd)} from rank 0. "
                "Start every rank with the same model and options."
            )


def raise_together(world: World, error: str | None) -> None:
    """Raise one ``UsageError`` on every rank if any rank has an ``error``. Collective.

    The message names the ranks when not all of them failed in the same way.
    """
    errors = world.gather(error)
    failed = [r for r, e in enumerate(errors) if e is not None]
    if not failed:
        return
    first = errors[failed[0]]
    same = len(failed) == world.size and all(e == first for e in errors)
    raise UsageError(first if same else f"rank {', '.join(map(str, failed))}: {first}")


def together(world: World, work: Callable[[], T]) -> T:
    """What ``work`` returns on each rank; if it fails with bad input on any, one ``UsageError`` on all. Collective."""
    value, problem = None, None
    try:
        value = work()
    except UsageError as error:
        problem = str(error)
    raise_together(world, problem)
    return value  # type: ignore[return-value]  # nothing failed


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
