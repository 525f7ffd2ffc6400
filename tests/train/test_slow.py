"""Artificially slow ranks: what the flag takes, and that the clock of a step really lasts so much longer."""

from __future__ import annotations

import time

import pytest
import torch

from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.modes import Sync
from hpcasync.train.slow import Slowdown, parse_slow


def test_factors_by_rank() -> None:
    assert parse_slow(["3:4", "1:0.5"], 4) == (1.0, 0.5, 1.0, 4.0)
    assert parse_slow([], 2) == (1.0, 1.0) and parse_slow(["9:2"], None) == ()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["3"], "--slow 3: .*RANK:FACTOR"),
        (["4:2"], "no worker 4; 4 workers are 0 to 3"),
        (["1:0"], "> 0"),
        (["1:nan"], "> 0"),
        (["1:2", "1:3"], "worker 1 .*already"),
    ],
)
def test_what_does_not_parse(items: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_slow(items, 4)


def test_a_live_rank_is_only_made_slower() -> None:
    with pytest.raises(UsageError, match=r"--slow 1:0.5: .*slower"):
        parse_slow(["1:0.5"], None, least=1)


def test_a_step_takes_so_many_times_its_computing() -> None:
    """Whatever the machine does: what was slept is a multiple of what was computed, and nothing is slept twice."""
    model = torch.nn.Linear(2, 2)
    mode = Sync(torch.optim.SGD(model.parameters(), lr=0.1), world=World(), model=model)
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        wait = time.sleep
        patch.setattr("hpcasync.train.slow.time.sleep", lambda seconds: (slept.append(seconds), wait(seconds)))
        Slowdown(mode, 5.0)
        seconds = []
        for _ in range(3):
            mode.zero_grad()
            before = mode.share.compute
            wait(0.02)
            model(torch.ones(1, 2)).sum().backward()
            mode.step()
            seconds.append(mode.share.compute - before)
    assert len(slept) == 3
    for whole, pause in zip(seconds, slept, strict=True):
        assert pause >= 4 * 0.02 and whole >= pause + 0.02
        assert pause < 0.85 * whole  # 4 of 5 parts, and the step itself on top
