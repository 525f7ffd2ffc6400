"""When to stop or save: any rank may have got a signal, and all must come to the same decision at a place where they can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.comm import World
from hpcasync.modes import Mode
from hpcasync.train import signals
from hpcasync.train.survive import Survival


@dataclass(frozen=True)
class Decision:
    """What all ranks do now: ``stop`` (and save before), ``save``, and whether all have come to the ``end`` of the epoch."""

    stop: bool = False
    save: bool = False
    end: bool = False


class Agreement:
    """For one rank: it decides alone."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    @property
    def world(self) -> World:
        """The ranks, of which some may have died since."""
        return self.mode.everyone

    def wanted(self, due: bool) -> bool:
        """After a step: whether all ranks come to a decision here.

        Args:
            due: this rank has made so many steps that it is time to save.
        """
        return due or bool(signals.received())

    def decide(self, due: bool, end: bool = False) -> Decision:
        """The decision. Collective: every rank for which ``wanted`` said so, and all those at the ``end`` of an epoch."""
        stop = bool(signals.received())
        return Decision(stop, due or stop, end)

    def asked_to_stop(self) -> bool:
        """At the end of an epoch: whether all ranks stop here; for ranks that meet there anyhow. Collective."""
        return False

    def close(self) -> None:
        """Leave the others. Collective."""


class Free(Agreement):
    """For ranks that go each at its own pace: a small message calls them together, each at its next step.

    A rank that got a signal tells rank 0 and goes to the meeting; rank 0 calls all others, from between two steps or from
    the meeting. Those at the end of their epoch wait in a meeting anyhow.
    """

    ASK, CALL = 1, 2

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self._comm = self.world.comm.Dup()
        self._meeting = 0  # number of the next meeting
        self._heard = {self.ASK: -1, self.CALL: -1}  # the latest meeting that such a message was about
        self._said = -1

    def wanted(self, due: bool) -> bool:
        mine = bool(signals.received())
        if self.world.rank == 0:
            mine = mine or due or self._hear(self.ASK)
            if mine:
                self._call()
            return mine
        if mine:
            self._say(0, self.ASK)
        return mine or self._hear(self.CALL)

    def decide(self, due: bool, end: bool = False) -> Decision:
        with self.mode.share.phase("wait"):
            self.world.within(wait, self._comm.Ibarrier(), self._while_waiting)
        due = due and self.world.rank == 0
        found = self.world.within(self._comm.allgather, (bool(signals.received()), due, end))
        self._meeting += 1
        return _decision(found)

    def close(self) -> None:
        self.world.within(self._comm.Barrier)  # what was said has arrived
        self._hear(self.ASK)
        self._hear(self.CALL)
        self._comm.Free()

    def _while_waiting(self) -> None:
        if self.world.rank == 0:
            if signals.received() or self._hear(self.ASK):
                self._call()
        elif signals.received() and self._said < self._meeting:
            self._say(0, self.ASK)

    def _call(self) -> None:
        if self._said < self._meeting:
            for rank in range(1, self.world.size):
                self._say(rank, self.CALL)

    def _say(self, rank: int, tag: int) -> None:
        self._said = self._meeting
        self._comm.Send(np.array([self._meeting], np.int64), dest=rank, tag=tag)  # 8 bytes: buffered by every library

    def _hear(self, tag: int) -> bool:
        """Whether somebody has said this of the coming meeting."""
        while self._comm.Iprobe(tag=tag):
            word = np.empty(1, np.int64)
            self._comm.Recv(word, tag=tag)
            self._heard[tag] = max(self._heard[tag], int(word[0]))
        return self._heard[tag] >= self._meeting


class Outliving(Agreement):
    """For ranks that go each at its own pace and may die: a word of shared memory calls them together."""

    def __init__(self, mode: Mode, survival: Survival) -> None:
        super().__init__(mode)
        self._survival = survival
        self._meeting = 0  # number of the next meeting

    def wanted(self, due: bool) -> bool:
        if signals.received() or (due and self.world.rank == 0):
            self._survival.call(self._meeting)
        return self._survival.called(self._meeting)

    def decide(self, due: bool, end: bool = False) -> Decision:
        own = bool(signals.received()), due and self.world.rank == 0, end
        with self.mode.share.phase("wait"):
            found = self.world.within(self._survival.star.allgather, own, self._while_waiting)
        self._meeting += 1
        return _decision(found)

    def _while_waiting(self) -> None:
        if signals.received():
            self._survival.call(self._meeting)


def _decision(found: list[tuple[bool, bool, bool]]) -> Decision:
    """What follows from who was asked to stop, for whom it is time to save, and who is at the end of its epoch."""
    stop, save, end = any(s for s, _, _ in found), any(d for _, d, _ in found), all(e for _, _, e in found)
    return Decision(stop, stop or save, end)


def wait(request: Any, meanwhile: Any = None) -> None:
    """Wait for a request of mpi4py, calling ``meanwhile`` in between."""
    # Not MPI's own wait, which would keep the core from the rank that everybody waits for.
    backoff = Backoff()
    while not request.Test():
        if meanwhile is not None:
            meanwhile()
        backoff.pause()
