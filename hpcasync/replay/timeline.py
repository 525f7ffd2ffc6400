"""A recorded run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing show: a track per rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.modes.recorder import Event
from hpcasync.replay.deaths import deaths_of
from hpcasync.replay.order import PULLS, order_of
from hpcasync.train.record_file import RankRecord

NAMES = {
    Event.PUSH: "apply", Event.SKIP: "pull", Event.DISCARD: "pull", Event.GATE: "pull", Event.SYNC: "pull", Event.RESUME: "pull",
    Event.TURN: "wait", Event.MEET: "wait", Event.CHECKPOINT: "checkpoint", Event.EVALUATE: "evaluation",
}  # fmt: skip
NOTES = {
    Event.SKIP: "gradient not finite", Event.DISCARD: "out of turn", Event.GATE: "bound on staleness", Event.SYNC: "synchronize",
    Event.TURN: "for its turn", Event.MEET: "for the other ranks", Event.RESUME: "from a checkpoint",
}  # fmt: skip
SHARDS_SHOWN = 16
INSIDE = 2e-7
"""Seconds that an arrow's end lies inside its slice."""

Trace = dict[str, Any]


def write_timeline(records: Sequence[RankRecord], path: Path, steps: tuple[int, int] | None = None) -> int:
    """Write the trace of a run.

    Args:
        records: of all ranks.
        path: of the JSON file.
        steps: only what belongs to these steps of each rank, both included.

    Returns:
        The number of entries.

    Raises:
        UsageError: no space, or no permission to write there.
    """
    count = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for entry in entries(records, steps):
            file.write((",\n" if count else "") + json.dumps(entry))
            count += 1
        file.write("\n]}\n")
    return count


def entries(records: Sequence[RankRecord], steps: tuple[int, int] | None = None) -> Iterator[Trace]:
    """The entries of the trace: names of the tracks, slices, then arrows from each push to the next read that saw it.

    Times are microseconds since the first step. What an event waited for is shown before it, although pushes wait between
    shards.
    """
    hosts = {r.facts["node"]: r.facts["machine"]["host"] for r in records}
    for node, host in hosts.items():
        yield {"ph": "M", "name": "process_name", "pid": node, "tid": 0, "args": {"name": f"node {node} ({host})"}}
    for record in records:
        place = _place(record)
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {record.rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": record.rank}}
    clocks = [record.facts["epoch_of_times"] for record in records]
    starts = [r.steps["start"][0] + c for r, c in zip(records, clocks, strict=True) if len(r.steps)]
    zero = min(starts, default=0.0)
    shifts = [clock - zero for clock in clocks]
    deaths = {death["rank"]: death for death in deaths_of(records)}
    last = max((float(r.events["end"].max()) + s for r, s in zip(records, shifts, strict=True) if len(r.events)), default=0.0)
    for record, shift in zip(records, shifts, strict=True):
        death = deaths.get(record.rank)
        if death is None:
            yield from _slices(record, shift, steps)
            continue
        known = [float(values.max()) + shift for values in (record.events["end"], record.steps["start"]) if len(values)]
        # The clocks of all ranks were compared when the run began; should one have been set since, what is known counts.
        died = max([min(death["time"] - zero, last), *known])
        yield from _slices(record, shift, steps, died)
        if _shown(len(record.steps), steps):
            about = {name: death[name] for name in ("epoch", "step", "updates", "samples")}
            about |= {"locks given free, shards": death["shards"]}
            yield {"ph": "i", "s": "t", "name": "died", "cat": "death", **_place(record), "ts": _us(died), "args": about}
    yield from _arrows(records, shifts, steps)


def _place(record: RankRecord) -> Trace:
    return {"pid": record.facts["node"], "tid": record.rank}


def _slices(
    record: RankRecord, shift: float, steps: tuple[int, int] | None, died: float | None = None
) -> Iterator[Trace]:
    """Of one rank; what it died in lasts until then."""
    place, events, rows = _place(record), record.events, record.steps
    ends = np.where(np.isnan(rows["end"]), rows["start"], rows["end"])
    if died is not None and len(rows) and np.isnan(rows["end"][-1]):
        ends[-1] = died - shift
        for push in record.pending[["begin", "step"]]:
            ends[-1] = begin = max(float(push["begin"]), float(events["end"].max(initial=-np.inf)))
            if _shown(int(push["step"]), steps):
                about = {"step": int(push["step"]), "why": "died in it"}
                yield _slice(place, "apply", begin + shift, died - begin - shift, about)
    chosen = [i for i in range(len(events)) if _shown(int(events["step"][i]), steps)]
    for number in range(1, len(rows) + 1):
        if not _shown(number, steps):
            continue
        about = {"step": number, "loss": _number(rows["loss"][number - 1]), "samples": int(rows["samples"][number - 1])}
        at, end = float(rows["start"][number - 1]), float(ends[number - 1])
        if not record.facts["shards"]:  # ranks in step have no events of single steps: their sums, one after the other
            for name, column in (("compute", "compute"), ("wait", "wait"), ("communicate", "apply")):
                length = float(rows[column][number - 1])
                yield _slice(place, name, at + shift, length, about)
                at += length
            continue
        first, last = np.searchsorted(events["begin"], [at, end])
        for i in [*range(first, last), None]:
            until = end if i is None else float(events["begin"][i])
            if until > at:
                yield _slice(place, "compute", at + shift, until - at, about)
            at = end if i is None else float(events["end"][i])
    for i in chosen:
        yield from _event_slices(record, i, place, shift)


def _event_slices(record: RankRecord, i: int, place: Trace, shift: float) -> Iterator[Trace]:
    event = record.events[i]
    kind = Event(int(event["kind"]))
    begin, whole = float(event["begin"]) + shift, float(event["end"] - event["begin"])
    waited = min(float(event["waited"]), whole)
    about: Trace = {"step": int(event["step"])}
    if kind in NOTES:
        about["why"] = NOTES[kind]
    if event["batch"] and event["batch"] != event["step"]:
        about["replays the batch of step"] = int(event["batch"])
    if NAMES[kind] == "wait" or (kind is Event.GATE and (record.versions[i] == record.before[i]).all()):
        waited = whole
    if kind in (Event.PUSH, *PULLS) and record.facts["shards"]:
        read, now = record.before[i], record.versions[i]
        about |= {"versions read": read[:SHARDS_SHOWN].tolist(), "versions now": now[:SHARDS_SHOWN].tolist()}
        if kind is Event.PUSH:
            about["staleness"] = max(0, int((now - read).max()) - 1)
    if waited:
        yield _slice(place, "wait", begin, waited, about)
    if whole > waited or NAMES[kind] != "wait":
        yield _slice(place, NAMES[kind], begin + waited, whole - waited, about)


def _slice(place: Trace, name: str, begin: float, seconds: float, about: Trace) -> Trace:
    return {"ph": "X", "name": name, "cat": name, **place, "ts": _us(begin), "dur": max(0.0, _us(seconds)), "args": about}


def _arrows(records: Sequence[RankRecord], shifts: Sequence[float], steps: tuple[int, int] | None) -> Iterator[Trace]:
    """From each push to the first event of another rank that saw it, in any shard: in the order of the shards' versions."""
    order = order_of(records, own_copy=False)
    first: dict[tuple[int, int], tuple[float, int, int]] = {}  # push -> end, rank and event of who saw it first
    for k in range(records[0].facts["shards"]):
        touched = []
        for r, record in enumerate(records):
            for only_read, places in ((0, order.writes[r][:, k]), (1, order.reads[r][:, k])):
                for i in np.flatnonzero(places).tolist():
                    touched.append((int(record.versions[i, k]), only_read, float(record.events["end"][i]) + shifts[r], r, i))
        touched.sort(reverse=True)
        near: tuple[float, int, int] | None = None  # the event that comes next,
        far: tuple[float, int, int] | None = None  # and the next one of another rank than that
        for _, only_read, end, r, i in touched:
            seen = near if near is not None and near[1] != r else far
            if not only_read and seen is not None and seen < first.get((r, i), (np.inf, 0, 0)):
                first[r, i] = seen
            if near is not None and near[1] != r:
                far = near
            near = end, r, i
    for number, ((r, i), (end, other, j)) in enumerate(sorted(first.items()), start=1):
        push = records[r].events[i]
        if not (_shown(int(push["step"]), steps) and _shown(int(records[other].events["step"][j]), steps)):
            continue
        about = {"name": "push", "cat": "push", "id": number}
        seen_by = records[other].events[j]
        # An end binds to the slice around it, so it may not lie on a border; a read of one shard may end before the push does.
        tip = end - min(INSIDE, float(seen_by["end"] - seen_by["begin"]) / 2)
        tail = float(push["begin"] + push["waited"]) + shifts[r]
        tail += min(INSIDE, max(0.0, float(push["end"]) + shifts[r] - tail) / 2)
        yield {"ph": "s", **about, **_place(records[r]), "ts": _us(min(tail, tip))}
        yield {"ph": "f", "bp": "e", **about, **_place(records[other]), "ts": _us(tip)}


def _shown(step: int, steps: tuple[int, int] | None) -> bool:
    return steps is None or steps[0] <= step <= steps[1]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
