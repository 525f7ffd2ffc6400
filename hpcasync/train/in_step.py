"""When to stop or save, for ranks that make the same steps: they ask each other for signals, waiting or while they compute."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from hpcasync.modes import Hierarchical, KStep, Mode
from hpcasync.train import signals
from hpcasync.train.agreement import Agreement, Decision, wait

LOOK_SECONDS = 0.25
"""How often the ranks ask each other."""


class InStep(Agreement):
    """For ranks that make the same steps together: saves are due on all at the same step, and signals are asked for in
    one small allreduce about four times a second, right after a step (sync) or an average (kstep, hierarchical) that was
    collective anyhow, and at the end of an epoch. How many steps that is follows from the slowest rank's pace, so that all
    ranks ask at the same step.
    """

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self._comm = self.world.comm.Dup()
        self._ticks, self._next, self._averages = 0, 1, 0
        self._began = time.perf_counter()
        self._pace = 0.0  # seconds from tick to tick on this rank
        self._stop = False

    def wanted(self, due: bool) -> bool:
        self._look()
        return due or self._stop

    def decide(self, due: bool, end: bool = False) -> Decision:
        return Decision(self._stop, due or self._stop, end)

    def asked_to_stop(self) -> bool:
        self._ask()
        return self._stop

    def close(self) -> None:
        self._comm.Free()

    def _look(self) -> None:
        if isinstance(self.mode, (KStep, Hierarchical)):
            if self.mode.averages == self._averages:
                return
            self._averages = self.mode.averages
        self._ticks += 1
        self._next -= 1
        if self._next == 0:
            self._ask()

    def _ask(self) -> None:
        now = time.perf_counter()
        if self._ticks:  # else this is the end of an epoch, right after the last step's question
            self._pace = (now - self._began) / self._ticks
        mine = np.array([bool(signals.received()), self._pace])
        both = np.empty_like(mine)
        with self.world.phase("asking for signals"):
            self.world.within(wait, self._comm.Iallreduce(mine, both, op=_max()))
        self._ticks, self._began = 0, now
        self._stop = bool(both[0])
        self._next = int(np.clip(LOOK_SECONDS / both[1], 1, 10_000)) if both[1] else 1


class Overlapped(Agreement):
    """For ranks that make as many steps as the others but wait for nobody (hierarchical with a delay): a question is a small
    allreduce that goes on while all compute.

    Each rank asks about four times a second, and looks after each step whether the answer is there. Only when somebody has
    got a signal do they wait: all find out the furthest step that one has come to, and stop there, or at the first one after
    it at which no average is under way, so that nothing of it is ended early. Where all meet anyhow, to save or at the end of
    an epoch, they ask until all have asked there: no question is left open.
    """

    def __init__(self, mode: Hierarchical) -> None:
        super().__init__(mode)
        self._hierarchical = mode
        self._comm = self.world.comm.Dup()
        self._question: Any = None  # the allreduce under way
        self._mine, self._all = np.zeros(2), np.zeros(2)  # a signal has come; asked elsewhere than in a meeting
        self._asked = time.perf_counter()
        self._steps = 0
        self._stop_at: float | None = None

    def wanted(self, due: bool) -> bool:
        self._steps += 1
        if self._stop_at is None:
            if self._question is None:
                if time.perf_counter() - self._asked >= LOOK_SECONDS:
                    self._ask(meeting=False)
            elif self._question.Test():
                self._hear(self._steps)
        return due or self._stops()

    def decide(self, due: bool, end: bool = False) -> Decision:
        self._meet(self._steps)
        stop = self._stops()
        return Decision(stop, due or stop, end)

    def asked_to_stop(self) -> bool:
        self._meet(self._steps + 0.5)  # no step of this epoch is one to stop at
        return self._stop_at is not None

    def close(self) -> None:
        self._comm.Free()

    def _stops(self) -> bool:
        return self._stop_at is not None and self._steps >= self._stop_at and not self._hierarchical.under_way

    def _ask(self, meeting: bool) -> None:
        self._asked = time.perf_counter()
        self._mine[:] = bool(signals.received()), not meeting
        self._question = self._comm.Iallreduce(self._mine, self._all, op=_max())

    def _hear(self, place: float) -> bool:
        """Take the answer; whether all have asked in a meeting. If somebody is to stop, agree on where: collective."""
        self._question = None
        if self._all[0]:
            mine, furthest = np.array([float(place)]), np.empty(1)
            wait(self._comm.Iallreduce(mine, furthest, op=_max()))
            self._stop_at = float(furthest[0])
        return not self._all[1]

    def _meet(self, place: float) -> None:
        """Close the questions. Collective."""
        together = False
        while self._stop_at is None and not together:
            if self._question is None:
                self._ask(meeting=True)
            wait(self._question)
            together = self._hear(place)


def _max() -> Any:
    from mpi4py import MPI

    return MPI.MAX
