"""When a waiting rank sees that its wait is over: it looks again after pauses that grow, as ``hpcasync.backoff`` makes them."""

from __future__ import annotations

from hpcasync.backoff import LONGEST, SHORTEST

SLACK = 60e-6
"""Seconds that a sleep takes longer than asked for: Linux's timer slack of 50 us, and waking up."""


def noticed(waited: float) -> float:
    """Seconds from the beginning of a wait to the first look at least ``waited`` seconds after it."""
    at, sleep = 0.0, SHORTEST
    while at < waited:
        if sleep == LONGEST:  # from here on in equal pauses
            pause = LONGEST + SLACK
            return at + pause * -(-(waited - at) // pause)
        at += sleep + SLACK
        sleep = min(2 * sleep, LONGEST)
    return at
