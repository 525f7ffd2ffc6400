"""What a push costs on its way: seconds of messages, and of waiting for the shards."""

from __future__ import annotations

import numpy as np

from hpcasync.rules import Rule
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.worker import Virtual
from hpcasync.store import Layout


class Wire:
    """Messages between workers and their stores, and the stores' queues.

    Args:
        config: whose cluster has the times.
        rule: of the run.
        layout: of the model.
        groups: each has a store.
        alone: each worker has its own store: what a local step costs is in its step time.

    Attributes:
        recorded: the times are those of a recorded run, waits included.
    """

    def __init__(self, config: SimulateConfig, rule: Rule, layout: Layout, groups: int, *, alone: bool) -> None:
        cluster = config.cluster
        self._every = rule.every
        self._transfer = 0.0 if alone else cluster.network.transfer(4 * sum(layout.sizes))
        self._service = 0.0 if alone else 4 * layout.total / cluster.service
        self._free = [np.zeros(len(layout.shards)) for _ in range(groups)]
        self.recorded = cluster.recording is not None and not alone

    def messages(self, worker: Virtual) -> tuple[float, float]:
        """Seconds that the push will travel and that what was read has travelled; as recorded, waits with it, where they were."""
        if self.recorded:
            return worker.times.communicate + worker.times.wait, 0.0
        return self._transfer_at(worker, 0), self._transfer_at(worker, -1)

    def _transfer_at(self, worker: Virtual, ahead: int) -> float:
        """Seconds of a message after the worker's present step, or after the last (-1): own copies meet the centre rarely."""
        step = worker.view.steps + ahead
        return self._transfer if step < 0 or step % self._every == 0 else 0.0

    def serve(self, worker: Virtual, now: float) -> float:
        """When the store is done with the push that arrives ``now``: one push at a time in each shard, the others queue.

        A push works on one shard after the other and takes free ones first, so as many pushes as there are shards
        go on side by side.
        """
        if self._service == 0 or worker.view.steps % self._every:
            return now
        free = self._free[worker.group]
        slot = int(free.argmin())
        free[slot] = max(now, float(free[slot])) + self._service
        worker.communicate += self._service
        return float(free[slot])
