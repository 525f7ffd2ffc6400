"""A close look at one step of one rank: its gradient, what it had read, what it wrote, and who wrote between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.errors import UsageError
from hpcasync.kernels import HYPER
from hpcasync.modes.recorder import Event
from hpcasync.replay.rank import Computed, Rank
from hpcasync.replay.replay import Outcome, Replay


@dataclass(frozen=True)
class Place:
    """A step of a rank."""

    rank: int
    step: int


def parse_place(text: str) -> Place:
    """``RANK:STEP``.

    Raises:
        UsageError: something else.
    """
    rank, _, step = text.partition(":")
    if not (rank.isdecimal() and step.isdecimal() and int(step) > 0):
        raise UsageError(f"--inspect {text}: expected RANK:STEP, such as 1:250; steps count from 1")
    return Place(int(rank), int(step))


def inspect(run: Path, place: Place, **options: Any) -> tuple[dict[str, Any], Outcome]:
    """Replay up to a step and look at it.

    Args:
        run: folder of the run.
        place: which step.
        options: of `Replay`.

    Returns:
        What was found, and the outcome of the replay.

    Raises:
        UsageError: no such rank or step, or one that the record does not reach; see `Replay`.
    """
    seen: list[dict[str, Any]] = []

    def watch(rank: Rank, found: Computed) -> None:
        if rank.worker.index == place.rank and rank.event["step"] == place.step:
            seen.append(_gradient(replay, rank, found))

    replay = Replay(run, watch=watch, **options)
    ranks = replay.records
    if place.rank >= len(ranks):
        raise UsageError(f"--inspect {place.rank}:{place.step}: the run has the ranks 0 to {len(ranks) - 1}")
    steps = len(ranks[place.rank].steps)
    if place.step > steps:
        raise UsageError(f"--inspect {place.rank}:{place.step}: rank {place.rank} made {steps} steps")
    outcome = replay.run(until=place.step, rank=place.rank)
    if not seen:
        raise UsageError(f"--inspect {place.rank}:{place.step}: the record ends before what this step depends on")
    row = ranks[place.rank].steps[place.step - 1]
    samples = ranks[place.rank].indices(place.step).tolist()
    about = {"rank": place.rank, "step": place.step, "loss": float(row["loss"]), "samples": samples}
    about |= {name: float(row[name]) for name in ("compute", "wait", "apply", "pull")}
    return about | {"updates": seen}, outcome


def _gradient(replay: Replay, rank: Rank, found: Computed) -> dict[str, Any]:
    """One gradient of the step: the first, or that of a guided replay."""
    event, record = rank.event, rank.record
    names = [name for name, _ in replay.model.named_parameters()]
    squares = [0.0 if g is None else float(np.dot(g.astype(np.float64), g.astype(np.float64))) for g in found.grads]
    pushed = bool(event["kind"] == Event.PUSH)
    return {
        "what": {Event.PUSH: "pushed", Event.SKIP: "skipped: not finite", Event.DISCARD: "discarded: out of turn"}[event["kind"]],
        "batch_of_step": int(event["batch"]),
        "loss": found.loss,
        "gradient_norm": float(np.sqrt(sum(squares))),
        "largest": sorted(zip(names, np.sqrt(squares).tolist(), strict=True), key=lambda pair: -pair[1])[:5],
        "lr": float(record.hypers[int(event["hyper"])][0][HYPER["lr"]]) if pushed else None,
        "shards": _shards(replay, rank),
    }


def _shards(replay: Replay, rank: Rank) -> list[dict[str, Any]]:
    """Per shard the version read before the gradient, the one there was after, and whose updates lay between."""
    mine, at = rank.worker.index, rank.at
    read, now = rank.record.before[at], rank.record.versions[at]
    writes, found = replay.order.writes, []
    for k in range(len(read)):
        written = bool(writes[mine][at, k])
        last = int(now[k]) - written
        between = {
            int(record.versions[i, k]): r
            for r, record in enumerate(replay.records)
            for i in np.flatnonzero(writes[r][:, k] & (record.versions[:, k] > read[k]) & (record.versions[:, k] <= last))
        }
        shard: dict[str, Any] = {"shard": k, "read": int(read[k]), "now": int(now[k]), "written": written}
        found.append(shard | {"staleness": last - int(read[k]), "between": [between[v] for v in sorted(between)]})
    return found
