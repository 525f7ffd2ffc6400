"""Averages among groups that go on while all compute: what mode hierarchical does with ``--delay``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class Overlap:
    """The averages under way. One begins in a group when its first worker has made K steps, and its sum can begin when all
    groups have; a group ends it D steps later, by what the average has changed in the copy that it sent.

    Args:
        delay: D, steps of a group's first worker.
        step: makes the block step in place, from the sum of so many models to the new one.
    """

    def __init__(self, delay: int, step: Callable[[np.ndarray, int], None]) -> None:
        self.delay, self._step = delay, step
        self._sent: dict[int, np.ndarray] = {}
        self._changes: dict[int, np.ndarray] = {}
        self.ready = 0.0

    def begin(self, group: int, model: np.ndarray) -> None:
        """A group sends a copy of its model, float32 (n,)."""
        self._sent[group] = model.copy()

    def complete(self, groups: Sequence[int], now: float, seconds: float) -> bool:
        """Make the sum, which lasts ``seconds``, if all these groups have sent; returns whether they have."""
        if not self._sent or not set(groups) <= self._sent.keys():
            return False
        first, *others = (self._sent[g] for g in sorted(self._sent))
        total = first.copy()
        for model in others:
            total += model
        self._step(total, len(self._sent))
        self._changes = {g: total - sent for g, sent in self._sent.items()}
        self._sent = {}
        self.ready = now + seconds
        return True

    def under_way(self, group: int) -> bool:
        """Whether the group has begun an average that it has not ended."""
        return group in self._sent or group in self._changes

    def ends(self, group: int) -> bool:
        """Whether the sum that the group waits for has been made, at ``ready``."""
        return group in self._changes

    def end(self, group: int, model: np.ndarray) -> None:
        """Move the group's model by what the average has changed."""
        model += self._changes.pop(group)

    def drop(self) -> None:
        """Forget what not all groups have sent."""
        self._sent = {}
