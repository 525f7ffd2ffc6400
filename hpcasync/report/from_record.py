"""What the ranks of a run did, from their records: for a run that has not come to its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.train.record_file import RankRecord

MOST = 1 << 16


def ranks_of_records(records: Sequence[RankRecord]) -> dict[str, np.ndarray]:
    """Seconds and staleness per rank, as ``ranks/`` of a finished run has them.

    Returns:
        ``rank``; ``compute``, ``communicate``, ``wait``: seconds, steps only; ``staleness``: int64 (ranks, counts), where
        the record has versions.
    """
    ranks: dict[str, np.ndarray] = {"rank": np.array([r.rank for r in records])}
    seconds = {name: np.array([np.nansum(r.steps[name]) for r in records]) for name in ("compute", "wait", "apply", "pull")}
    ranks |= {"compute": seconds["compute"], "communicate": seconds["apply"] + seconds["pull"], "wait": seconds["wait"]}
    if records[0].facts["shards"]:
        counts = [np.bincount(staleness(r)) for r in records]
        widest = max(map(len, counts))
        ranks["staleness"] = np.array([np.pad(c, (0, widest - len(c))) for c in counts])
    return ranks


def staleness(record: RankRecord) -> np.ndarray:
    """int64: of every push of every shard, in their order: updates of others between the rank's read and its write."""
    pushes = record.events["kind"] == Event.PUSH
    written = record.events["versions"][pushes]
    values = written - 1 - record.before[pushes]
    return np.clip(values[written >= 0], 0, MOST)  # a damaged file must not ask for much memory
