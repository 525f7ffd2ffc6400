"""Ranks that died in the middle of a recorded run: what they left that no counted row tells of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from hpcasync.errors import UsageError, damaged
from hpcasync.replay.order import Order
from hpcasync.store import NOTES, Store, Torn
from hpcasync.train.record_deaths import meetings_of, torn_of
from hpcasync.train.record_file import RankRecord


def deaths_of(records: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """The deaths that the others went on after; empty for a run that was killed whole."""
    found: list[dict[str, Any]] = records[0].end.get("deaths", [])
    return found


def with_last_pushes(records: Sequence[RankRecord]) -> list[RankRecord]:
    """The records, with the push that a rank died in: the shards of it that were done, if any."""
    found = list(records)
    for i, record in enumerate(records):
        pending = record.pending
        if not len(pending):
            continue
        versions = pending["versions"][0]
        before = record.versions[-1] if len(record.events) else np.zeros_like(versions)
        if ((versions >= 0) & (versions > before)).any():
            found[i] = replace(record, events=np.concatenate([record.events, pending]))
    return found


class Left:
    """What dead ranks left: shards as they were, and averages of buffers, put in place as a replay comes there.

    Args:
        records: of all ranks.
        order: of the run.
        store: of the replay.
        buffers: of the model.

    Raises:
        UsageError: the record of rank 0 is damaged.
    """

    def __init__(self, records: Sequence[RankRecord], order: Order, store: Store, buffers: Sequence[Tensor]) -> None:
        self._store, self._order = store, order
        self._torn: dict[int, list[tuple[int, Torn]]] = {}  # by shard, each with the version that comes before it
        path, last = records[0].path, dict[int, int]()
        with damaged(f"{path}: can't be read", "what it tells of deaths is damaged; copy it again"):
            self.meetings = meetings_of(records[0].deaths)
            for averaged in self.meetings.values():
                if [b.shape for b in averaged] != [b.shape for b in buffers]:
                    raise UsageError(f"{path}: averaged buffers have another shape than the model's; copy it again")
            for torn in torn_of(records[0].deaths):
                k, shard = torn.shard, store.layout.shards[torn.shard]
                if torn.state.shape != store.state[:, shard.start : shard.stop].shape or torn.notes.shape != (NOTES,):
                    raise UsageError(f"{path}: shard {k} as a dead rank left it has another shape; copy it again")
                written = [r.versions[w[:, k], k] for r, w in zip(records, order.writes, strict=True)]
                earlier = [versions[versions < torn.version].max(initial=0) for versions in written]
                self._torn.setdefault(k, []).append((max(last.get(k, 0), *map(int, earlier)), torn))
                last[k] = torn.version

    def tear(self, k: int) -> None:
        """Put shard ``k`` as a dead rank left it, if everything has been done and read that came before."""
        waiting, store = self._torn.get(k), self._store
        while waiting and waiting[0][0] == store.versions[k] and not self._order.readers[k, int(store.versions[k])]:
            _, torn = waiting.pop(0)
            shard = store.layout.shards[k]
            store.state[:, shard.start : shard.stop] = torn.state
            store.notes[k], store.versions[k] = torn.notes, torn.version
