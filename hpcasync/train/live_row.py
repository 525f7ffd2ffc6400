"""What a rank tells of itself while it trains, as it lies in shared memory. Only the standard library here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

SILENT_SECONDS = 3.0
"""A training rank that has told nothing for so long, and for several steps' time, is silent."""


class State(IntEnum):
    """What a rank does."""

    STARTS = 0
    TRAINS = 1
    MEETS = 2
    """It has come to the end of an epoch: waits for the others, evaluates."""
    ENDED = 3
    DIED = 4
    """Rank 0 says so of it."""


class Row(NamedTuple):
    """One rank; what is not a count is over its last seconds of training."""

    time: float = 0.0
    """When it told this, seconds of the node's monotonic clock."""
    pause: float = 0.0
    """Seconds of a step."""
    state: float = State.STARTS
    epoch: float = 0
    steps: float = 0
    """Of the whole run."""
    updates: float = 0
    """Of the whole run."""
    loss: float = 0.0
    """Mean over its samples."""
    speed: float = 0.0
    """Samples per second on the clock of its `TimeShare`."""
    compute: float = 0.0
    """Share of that time, as the next two."""
    communicate: float = 0.0
    wait: float = 0.0
    staleness: float = 0
    """Median, in updates."""
    staleness_max: float = 0

    @property
    def pace(self) -> float:
        """Samples per second of the time that it did not wait for others: in step, all have the slowest one's speed."""
        return self.speed / max(1e-3, 1.0 - self.wait)

    def silence(self, now: float) -> float:
        """Seconds since it told something, 0 for a rank that is not overdue: between epochs nobody tells anything."""
        age = now - self.time
        return age if self.state == State.TRAINS and age > max(SILENT_SECONDS, 4 * self.pause) else 0.0


_ROW = struct.Struct(f"{len(Row._fields) + 2}d")  # between two copies of a counter: a reader sees if it was written meanwhile
NBYTES = -(-_ROW.size // 64) * 64
"""Bytes from one row to the next: whole cache lines, each written by one rank."""


def write_row(memory: Any, rank: int, row: Row, count: int) -> None:
    """Write the row of ``rank``; ``count`` differs from one call to the next."""
    _ROW.pack_into(memory, NBYTES * rank, count, *row, count)


def read_rows(memory: Any, ranks: Sequence[int]) -> list[Row]:
    """The rows of these ranks. One that is being written again and again is given as it is: it is for people."""
    found = []
    for rank in ranks:
        for _ in range(4):
            before, *values, after = _ROW.unpack_from(memory, NBYTES * rank)
            if before == after:
                break
        found.append(Row(*values))
    return found


def slowest(rows: Sequence[Row], now: float) -> int | None:
    """Who holds up the others, as an index: the longest silent one, else the one of the least pace; None where nobody trains."""
    if len(rows) < 2:
        return None
    silent = max(range(len(rows)), key=lambda i: rows[i].silence(now))
    if rows[silent].silence(now):
        return silent
    training = [i for i, row in enumerate(rows) if row.speed > 0]
    return min(training, key=lambda i: rows[i].pace) if len(training) > 1 else None


def living(rows: Sequence[Row]) -> list[Row]:
    """Those that have not died; rank 0 is always one."""
    return [row for row in rows if row.state != State.DIED]


def middle(values: Sequence[float]) -> float:
    """The lower median, 0 of nothing."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


def mean_loss(rows: Sequence[Row]) -> float:
    """Of those that have trained."""
    losses = [row.loss for row in rows if row.speed > 0]
    return sum(losses) / len(losses) if losses else 0.0
