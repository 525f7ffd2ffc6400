"""What a run gives: the result that ``--json`` prints, and each rank's record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.comm import World
from hpcasync.modes import Async, Guided, Mode, Sync
from hpcasync.rules import Rule
from hpcasync.stats import Staleness, parts_of
from hpcasync.train.config import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a run gives, on every rank.

    Attributes:
        result: the object that ``--json`` prints.
        ranks: per rank, where its time went and how stale its pushes were; empty for a run that was stopped.
        folder: of the run's records.
        stopped: the signal that stopped it after a checkpoint, empty for a run that came to its end.
    """

    result: dict[str, Any]
    ranks: list[dict[str, Any]]
    folder: Path
    stopped: str = ""


def rank_record(mode: Mode, samples: int) -> dict[str, Any]:
    """Where this rank's time went, and how stale its pushes were."""
    share = mode.share
    return {
        "rank": mode._worker.index if isinstance(mode, Async) and mode.everyone is mode.world else mode.everyone.rank,
        "seconds": share.seconds,
        "compute": share.compute,
        "communicate": share.communicate,
        "wait": share.wait,
        **({"copy": share.copy} if share.copy else {}),
        "share": share.shares(),
        "samples": samples,
        "updates": mode.updates,
        "skipped": mode.skipped,
        "staleness": mode.staleness.counts,
        **({"discarded": mode.discarded} if isinstance(mode, Async) else {}),
    }


def result_of(
    config: TrainConfig, rule: Rule, ranks: Sequence[dict[str, Any]], row: dict[str, float], *, seconds: float, nodes: int
) -> dict[str, Any]:
    """The result, live or simulated, from the ranks' records and the last evaluation.

    In asynchronous modes with ``lock_free``, whether updates may be lost; with rules in turn with ``discarded``, gradients
    that came out of turn and were thrown away.
    """
    staleness = Staleness()
    for rank in ranks:
        staleness = staleness.merge(Staleness(rank["staleness"]))
    result = {
        "test_accuracy": row["test_accuracy"],
        "test_loss": row["test_loss"],
        "train_loss": row["train_loss"],
        "samples_per_second": sum(rank["samples"] for rank in ranks) / seconds if seconds else 0.0,
        "seconds": seconds,
        "updates": int(row["updates"]),
        "skipped": sum(rank["skipped"] for rank in ranks),
        "epochs": config.epochs,
        "ranks": len(ranks),
        "nodes": nodes,
        "mode": config.mode,
        "rule": config.rule,
        "base": config.options["base"],
        "data": config.data,
        "model": config.model,
        "partition": config.partition,
        "seed": config.seed,
        "staleness": staleness.summary(),
        "share": {k: float(np.mean([r["share"].get(k, 0.0) for r in ranks])) for k in parts_of(ranks)},
    }
    if config.mode in ("async", "hierarchical"):
        result["lock_free"] = rule.lock_free
        if rule.in_turn:
            result["discarded"] = sum(rank["discarded"] for rank in ranks)
    return result


def guided_record(guided: Guided, world: World) -> dict[str, int]:
    """What guidance cost over all ranks, beside the ordinary steps; replays of `Sync` are updates that all share."""
    own = (guided.evaluations, guided.gradients, guided.replays)
    evaluations, gradients, replays = (sum(column) for column in zip(*world.gather(own)))
    shared = guided.replays if isinstance(guided.mode, Sync) else replays
    return {"rho": guided.rho or 0, "evaluations": evaluations, "gradients": gradients, "replays": shared}
