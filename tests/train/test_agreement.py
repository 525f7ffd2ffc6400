"""How often ranks in step ask each other for signals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcasync.comm import World
from hpcasync.train import agreement


class OneRank:
    """What `InStep` needs of a communicator, of one rank: counts the questions."""

    def __init__(self) -> None:
        self.questions = 0

    def Dup(self) -> OneRank:
        return self

    def Iallreduce(self, mine: np.ndarray, both: np.ndarray, op: Any) -> Any:
        self.questions += 1
        both[:] = mine
        return SimpleNamespace(Test=lambda: True)


def test_slow_steps_are_asked_about_each_also_after_the_end_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question right after another, at the end of an epoch, says nothing of how long steps last."""
    clock = [0.0]
    monkeypatch.setattr(agreement, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    comm = OneRank()
    looks: Any = agreement.InStep(SimpleNamespace(everyone=replace(World(), comm=comm)))  # type: ignore[arg-type]
    for epoch in range(3):
        for _ in range(4):
            clock[0] += 1.0  # seconds of a step
            looks.wanted(False)
        clock[0] += 1e-6
        assert not looks.asked_to_stop()
        assert comm.questions == 5 * (epoch + 1)


def test_quick_steps_are_asked_about_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(agreement, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    comm = OneRank()
    looks: Any = agreement.InStep(SimpleNamespace(everyone=replace(World(), comm=comm)))  # type: ignore[arg-type]
    for _ in range(10_000):
        clock[0] += 0.001
        looks.wanted(False)
    assert 39 <= comm.questions <= 42  # in 10 seconds
