"""Ranks that died in the middle of a recorded run: what their records do not say of their last update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.replay.order import order_of
from hpcasync.train.record_file import RankRecord


def deaths_of(records: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """The deaths that the others went on after; empty for a run that did not come to its end."""
    found: list[dict[str, Any]] = records[0].end.get("deaths", [])
    return found


def with_last_pushes(records: Sequence[RankRecord]) -> list[RankRecord]:
    """The records, those of dead ranks with the push that they died in.

    A rank that is killed between its first shard and the end of its push has recorded the samples and the hyper-parameters
    of the step, but not the push: the shards that it had done are those whose versions nobody else has made. Where several
    dead ranks may have made one it is left out, and a replay stops there.
    """
    found = list(records)
    dead = [death["rank"] for death in deaths_of(records)]
    for shard, version in _made_by_nobody(records) if dead else ():
        may = [rank for rank in dead if _may_have_made(records[rank], shard, version)]
        if len(may) == 1:
            found[may[0]] = _with_push(found[may[0]], records[may[0]], shard, version)
    return found


def _made_by_nobody(records: Sequence[RankRecord]) -> list[tuple[int, int]]:
    """Shards and versions that are in no rank's record as written, but were read or written over."""
    gaps = []
    writes = order_of(records, own_copy=False).writes
    for shard in range(records[0].versions.shape[1]):
        made = np.concatenate([r.versions[w[:, shard], shard] for r, w in zip(records, writes, strict=True)])
        last = max(int(r.versions[:, shard].max(initial=0)) for r in records)
        gaps += [(shard, int(version)) for version in np.setdiff1d(np.arange(1, last + 1), made)]
    return gaps


def _may_have_made(record: RankRecord, shard: int, version: int) -> bool:
    """Whether the rank was in a step that it recorded no event of, and had not seen that version."""
    events = record.events
    if record.facts["config"].get("guided"):  # a step of its has several pushes
        return False
    ended = events["step"][np.isin(events["kind"], (Event.PUSH, Event.SKIP, Event.DISCARD))]
    begun = len(record.steps) > (int(ended[-1]) if len(ended) else 0)
    return begun and (not len(events) or version > int(record.versions[-1, shard]))


def _with_push(record: RankRecord, original: RankRecord, shard: int, version: int) -> RankRecord:
    """The record with one more push, or with one more shard in the push that was added before."""
    events = record.events
    if len(events) == len(original.events):
        row = np.zeros(1, events.dtype)
        pushes = events["clock"][events["kind"] == Event.PUSH]
        row["kind"], row["hyper"], row["step"] = Event.PUSH, len(record.hypers) - 1, len(record.steps)
        row["batch"], row["clock"] = len(record.steps), int(pushes[-1]) + 1 if len(pushes) else 0
        row["versions"] = record.versions[-1] if len(events) else 0
        events = np.concatenate([events, row])
    else:
        events = events.copy()
    events["versions"][-1, shard] = version
    return replace(record, events=events)
