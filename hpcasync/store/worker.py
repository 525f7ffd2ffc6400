"""One worker of a store: what it has read, and its own counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcasync.comm.signs import Signs
from hpcasync.rules.base import NO_VECTORS
from hpcasync.stats import Staleness

Observer = Callable[[int, int, int], None]
"""Told ``(shard, version read, version written)`` of every push, under the shard's lock: records and replay hang here."""


class Worker:
    """One worker's view of a store: what it has read, and its own counts.

    Attributes:
        index: the worker's number, 0 .. workers-1.
        read: int64 (shards,), the version of each shard that this worker last read.
        pushed: bool (shards,), the shards that this worker has pushed.
        steps: calls of ``push_pull`` by this worker.
        held: gradients that had to wait for this worker's turn.
        private: float32 (private vectors of the rule, elements), its own vectors.
        staleness: histogram over all pushes of shards.
        waited: seconds spent waiting for locks and for slower workers.
        signs: where to tell what it waits for; None for nobody.
    """

    def __init__(self, index: int, shards: int, workers: int, private: np.ndarray | None = None) -> None:
        self.index = index
        self.read = np.zeros(shards, np.int64)
        self.pushed = np.zeros(shards, bool)
        self.steps = 0
        self.private = NO_VECTORS if private is None else private
        self.refused: float | None = None  # since when it has been waiting for its turn
        self.held = 0
        self.staleness = Staleness()
        self.waited = 0.0
        self.observer: Observer | None = None
        self.signs: Signs | None = None
        self._before: int | None = None
        # Workers begin at different shards, so that they do not queue behind each other.
        self.first = index * shards // workers

    def waits(self, kind: int) -> None:
        """Tell that it waits for something of ``hpcasync.comm.signs.KINDS``, until it ``goes_on``."""
        if self.signs is not None and self._before is None:
            self._before = self.signs.begin(kind)

    def goes_on(self) -> None:
        """Tell that it waits no longer."""
        if self.signs is not None and self._before is not None:
            self.signs.end(self._before)
            self._before = None
