"""Where two recorded runs part: in their samples, hyper-parameters, losses, or the order of their updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.train.record_file import RankRecord

_STORE = (Event.PUSH, Event.SKIP, Event.DISCARD, Event.SYNC, Event.RESUME)
_PLACE = (
    "output", "name", "resume", "record", "live", "tensorboard", "keep", "checkpoint_every", "stall_seconds", "device", "threads",
)  # fmt: skip

Finder = Callable[[RankRecord, RankRecord], int | None]


def compare(one: Sequence[RankRecord], other: Sequence[RankRecord]) -> dict[str, Any]:
    """The first step at which two runs differ, from their records alone.

    Returns:
        ``identical``; ``settings`` that differ, each with both values; ``first``: ``what``, ``rank`` and ``step`` of the first
        difference, None if there is none; ``differences``: the first of each kind. Of equal steps, causes come before effects.
    """
    a, b = one[0].facts, other[0].facts
    settings = {
        key: [a["config"].get(key), b["config"].get(key)]
        for key in dict.fromkeys([*a["config"], *b["config"]])
        if key not in _PLACE and a["config"].get(key) != b["config"].get(key)
    }
    settings |= {key: [a[key], b[key]] for key in ("ranks", "threads", "data", "code", "start_sha256") if a[key] != b[key]}
    differences: list[dict[str, Any]] = []
    for what, finder in FINDERS.items():
        steps = [(step, rank) for rank, (x, y) in enumerate(zip(one, other)) if (step := finder(x, y)) is not None]
        if steps:
            step, rank = min(steps)
            differences.append({"what": what, "rank": rank, "step": step})
    first = min(differences, key=lambda d: int(d["step"]), default=None)
    ends = [records[0].end.get("parameters_sha256") for records in (one, other)]
    same = not differences and len(one) == len(other) and ends[0] == ends[1]
    return {"identical": same, "first": first, "differences": differences, "settings": settings, "parameters_sha256": ends}


def _samples(one: RankRecord, other: RankRecord) -> int | None:
    for step in range(1, min(len(one.steps), len(other.steps)) + 1):
        if not np.array_equal(one.indices(step), other.indices(step)):
            return step
    return None


def _losses(one: RankRecord, other: RankRecord) -> int | None:
    count = min(len(one.steps), len(other.steps))
    a, b = one.steps["loss"][:count], other.steps["loss"][:count]
    return _first((a != b) & ~(np.isnan(a) & np.isnan(b)))


def _lengths(one: RankRecord, other: RankRecord) -> int | None:
    a, b = len(one.steps), len(other.steps)
    return None if a == b else min(a, b) + 1


def _hypers(one: RankRecord, other: RankRecord) -> int | None:
    a, b = (r.events[r.events["kind"] == Event.PUSH] for r in (one, other))
    count = min(len(a), len(b))
    if not count or one.hypers.shape[1:] != other.hypers.shape[1:]:
        return 1 if count else None
    x, y = one.hypers[a["hyper"][:count]], other.hypers[b["hyper"][:count]]
    found = _first((x != y).any((1, 2)))
    return None if found is None else int(a["step"][found - 1])


def _order(one: RankRecord, other: RankRecord) -> int | None:
    """What was read and written, event by event; only waiting does not count."""
    rows = []
    for r in (one, other):
        kept = np.isin(r.events["kind"], _STORE) | ((r.events["kind"] == Event.GATE) & (r.versions != r.before).any(1))
        columns = [r.events[name][kept].astype(np.int64) for name in ("kind", "step", "batch")]
        rows.append(np.column_stack([*columns, r.events["versions"][kept]]))
    a, b = rows
    if a.shape[1] != b.shape[1]:
        return 1
    count = min(len(a), len(b))
    found = _first((a[:count] != b[:count]).any(1))
    if found is not None:
        return int(min(a[found - 1, 1], b[found - 1, 1]))
    longer = a if len(a) > len(b) else b
    return None if len(a) == len(b) else int(longer[count, 1])


def _first(differs: np.ndarray) -> int | None:
    """The number, from 1, of the first true entry."""
    found = np.flatnonzero(differs)
    return int(found[0]) + 1 if len(found) else None


FINDERS: dict[str, Finder] = {
    "samples": _samples, "hyper-parameters": _hypers, "loss": _losses, "order": _order, "number of steps": _lengths
}  # fmt: skip
"""What is compared, causes first: a loss shows what was read before; the order of a step's push comes after its loss."""
