"""The workers' clocks: turns of rules that go in rounds, and the bound on staleness."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.comm.signs import BOUND, TURN
from hpcasync.rules import Rule
from hpcasync.store.worker import Worker

IDLE = np.iinfo(np.int64).max
"""Clock of a worker that the others need not wait for."""


class StalledCallback(Protocol):
    """Told how long a worker has waited, and for which slower workers."""

    def __call__(self, seconds: float, slow: list[int]) -> None: ...


class Clocks:
    """Who waits for whom. A subclass that does not hold the clocks itself says how they are read and set.

    Args:
        rule: may go in rounds.
        clocks: int64 (workers,), pushes of each worker, ``IDLE`` for one that nobody needs to wait for.
        excused: int64 (workers,), 1 for a worker that rounds do not wait for until it comes.
    """

    def __init__(self, rule: Rule, clocks: np.ndarray, excused: np.ndarray) -> None:
        self.rule = rule
        self.clocks = clocks
        self.excused = excused

    def look(self) -> None:
        """Bring ``clocks`` and ``excused`` up to date."""

    def set_clock(self, worker: int, value: int) -> None:
        """Set a worker's clock."""
        self.clocks[worker] = value

    def set_excused(self, worker: int, value: int) -> None:
        """Set whether rounds go on without a worker."""
        self.excused[worker] = value

    def tick(self, worker: Worker) -> None:
        """Count a push of the worker, unless nobody waits for it."""
        i = worker.index
        if self.clocks[i] != IDLE:
            self.clocks[i] += 1

    # Rounds (rules in turn): a worker's clock is the round that it has its next turn in.

    def may_push(self, worker: Worker) -> bool:
        """Whether it is the worker's turn: nobody that the round waits for has an earlier one. Always unless ``in_turn``.

        All workers of a round may push at the same time. Once given, the turn stays until the push.
        """
        if not self.rule.in_turn:
            return True
        i = worker.index
        self.look()
        if self.excused[i]:  # it is back: it joins the round that the others are in
            there = (self.excused == 0) & (self.clocks != IDLE)
            if there.any():
                self.set_clock(i, max(int(self.clocks[i]), int(self.clocks[there].min())))
            self.set_excused(i, 0)
        return bool((self.clocks[self.excused == 0] >= self.clocks[i]).all())

    def excuse(self, worker: Worker) -> None:
        """Let rounds turn without the workers that ``worker`` waits for, each until it asks for its turn again.

        A worker that comes at this very moment is excused too; it only is not waited for, for one round.
        """
        for slow in np.flatnonzero(self.clocks < self.clocks[worker.index]).tolist():
            self.set_excused(slow, 1)

    def take_turn(
        self,
        worker: Worker,
        *,
        hold: bool,
        patience: float,
        stalled: StalledCallback | None = None,
        every: float = 30.0,
    ) -> bool:
        """Wait for the worker's turn; at most ``patience`` seconds, then the round turns without the slower workers.

        Args:
            worker: who wants to push.
            hold: wait; otherwise only ask.
            patience: seconds since the worker was first refused.
            stalled: called every ``every`` seconds of waiting.

        Returns:
            Whether it is its turn; always with ``hold``.
        """
        backoff = Backoff()
        told = time.perf_counter()
        while not self.may_push(worker):
            now = time.perf_counter()
            if worker.refused is None:
                worker.refused = now
                worker.held += hold
            if now - worker.refused > patience:
                self.excuse(worker)
                continue
            if not hold:
                return False
            worker.waits(TURN)
            worker.waited += backoff.pause()
            if stalled is not None and now - told > every:
                told = now
                slow = (self.clocks < self.clocks[worker.index]) & (self.excused == 0)
                stalled(now - worker.refused, np.flatnonzero(slow).tolist())
        worker.refused = None
        worker.goes_on()
        return True

    # Bounded staleness.

    def gate(self, worker: Worker, bound: int, stalled: StalledCallback | None = None, every: float = 30.0) -> bool:
        """Wait while this worker is more than ``bound`` pushes ahead of the slowest (stale synchronous parallel).

        Args:
            worker: who asks.
            bound: pushes; 0 keeps all workers in step.
            stalled: called every ``every`` seconds of waiting.

        Returns:
            Whether it had to wait: then others have pushed since, and a pull brings their work.
        """
        if self._ahead(worker) <= bound:
            return False
        began = last = time.perf_counter()
        backoff = Backoff()
        worker.waits(BOUND)
        while self._ahead(worker) > bound:
            worker.waited += backoff.pause()
            now = time.perf_counter()
            if stalled is not None and now - last > every:
                last = now
                slow = np.flatnonzero(self.clocks < self.clocks[worker.index] - bound)
                stalled(now - began, slow.tolist())
        worker.goes_on()
        return True

    def _ahead(self, worker: Worker) -> int:
        self.look()
        mine = int(self.clocks[worker.index])
        return 0 if mine == IDLE else mine - int(self.clocks.min())
