"""K, the local steps per average: one number, or a schedule over the steps."""

from __future__ import annotations

import math
from typing import Any

from hpcasync.errors import UsageError

Pieces = tuple[tuple[int, float], ...]
"""``(K, until)``: K holds for blocks that begin before step ``until``; the last ``until`` is infinite."""


def parse_every(every: Any, name: str = "every") -> Pieces:
    """``32``, or ``"1:100,8:500,32"``: every step for the first 100, every 8th until 500, then every 32nd.

    Raises:
        UsageError: a K below 1, steps that do not ascend, or something else than that.
    """
    if isinstance(every, int) and not isinstance(every, bool):
        if every < 1:
            raise UsageError(f"{name}={every!r}: expected a whole number >= 1")
        return ((every, math.inf),)
    if not isinstance(every, str):
        raise UsageError(f"{name}={every!r}: expected a whole number, or a schedule such as '1:100,8:500,32'")
    pieces: list[tuple[int, float]] = []
    *parts, last = every.split(",")
    try:
        for part in parts:
            k, _, until = part.partition(":")
            pieces.append((int(k), int(until)))
        pieces.append((int(last), math.inf))
    except ValueError:
        raise UsageError(
            f"{name}={every!r}: expected a whole number, or K:STEP,...,K such as '1:100,8:500,32' (the last K, without a "
            "step, holds to the end)"
        ) from None
    least = 0.0
    for count, end in pieces:
        if count < 1:
            raise UsageError(f"{name}={every!r}: K is {count}, expected at least 1")
        if end <= least:
            raise UsageError(f"{name}={every!r}: step {end:g} after {least:g}, expected ascending steps from 1")
        least = end
    return tuple(pieces)


def interval_at(pieces: Pieces, step: int) -> int:
    """K of the block that begins after ``step`` steps; a block keeps its K to its end."""
    return next(k for k, until in pieces if step < until)
