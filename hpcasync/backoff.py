"""Waiting without spinning a core away: yield first, then sleep in growing steps."""

from __future__ import annotations

import time

YIELDS = 20
SHORTEST = 20e-6
LONGEST = 1e-3


class Backoff:
    """Pauses that grow from giving up the time slice to sleeping 1 ms.

    With more ranks than cores the lock's holder may not be running: spinning would keep it from its core.
    """

    def __init__(self) -> None:
        self._pauses = 0
        self._sleep = SHORTEST

    def pause(self) -> float:
        """Pause once; returns the seconds it took."""
        began = time.perf_counter()
        self._pauses += 1
        if self._pauses <= YIELDS:
            time.sleep(0)
        else:
            time.sleep(self._sleep)
            self._sleep = min(2 * self._sleep, LONGEST)
        return time.perf_counter() - began
