"""The order of a recorded run: per shard the updates one after the other, and the reads between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.train.record_file import RankRecord

PULLS = (Event.SKIP, Event.DISCARD, Event.GATE, Event.RESUME, Event.SYNC)
"""Events that may read without writing."""


@dataclass(frozen=True)
class Order:
    """What each event of each rank does to each shard.

    Attributes:
        writes: per rank bool (events, shards): the event makes the shard's version what it is after the event.
        reads: per rank bool (events, shards): it reads the shard at that version.
        readers: of (shard, version), how many reads have not been made yet; ``replay`` counts them down.
    """

    writes: tuple[np.ndarray, ...]
    reads: tuple[np.ndarray, ...]
    readers: Counter[tuple[int, int]]


def order_of(records: Sequence[RankRecord], *, own_copy: bool) -> Order:
    """The order of a run.

    Args:
        records: of all ranks.
        own_copy: of the rule: then only ``synchronize()`` reads without writing.
    """
    writes, reads, readers = [], [], Counter[tuple[int, int]]()
    for record in records:
        kinds = record.events["kind"][:, None]
        changed = record.versions != record.before
        pushed = kinds == Event.PUSH
        written = pushed & changed & (record.events["versions"] >= 0)
        # A pull of a shard that has not changed brings nothing, but for a copy that has gone its own way.
        read = changed & ~written & (pushed | np.isin(kinds, PULLS))
        if own_copy:
            read = np.zeros_like(read)
        read |= np.broadcast_to(kinds == Event.SYNC, read.shape)
        for event, shard in zip(*np.nonzero(read), strict=True):
            readers[int(shard), int(record.versions[event, shard])] += 1
        writes.append(written)
        reads.append(read)
    return Order(tuple(writes), tuple(reads), readers)
