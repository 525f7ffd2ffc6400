"""Working ahead: every job once, errors to whoever takes, pauses, the soonest first."""

from __future__ import annotations

import threading
import time

import pytest

from hpcasync.simulate.ahead import AHEAD, Ahead


@pytest.mark.parametrize("helpers", [0, 1, 4])
def test_every_job_is_done_once(helpers: int) -> None:
    done: list[int] = []

    def work(lane: int, owner: int, job: int) -> int:
        done.append(job)
        return owner + job

    ahead = Ahead(work, helpers)
    for turn in range(200):
        for owner in range(9):
            ahead.request(owner, 100 * turn + owner, turn)
        assert [ahead.take(owner) for owner in range(9)] == [100 * turn + 2 * owner for owner in range(9)]
    ahead.close()
    assert sorted(done) == sorted(100 * t + o for t in range(200) for o in range(9))


def test_the_soonest_is_done_first_and_not_too_many() -> None:
    done: list[int] = []
    ahead = Ahead(lambda lane, owner, job: done.append(owner), 1)
    with ahead.pause():
        for owner in range(9):
            ahead.request(owner, None, -owner)
    for _ in range(1000):
        if len(done) == AHEAD:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert done == [8, 7, 6, 5][:AHEAD]
    ahead.close()


def test_an_error_goes_to_who_takes_and_a_canceled_job_is_gone() -> None:
    def work(lane: int, owner: int, job: None) -> int:
        if owner == 1:
            raise ValueError("one")
        return owner

    ahead = Ahead(work, 2)
    for owner in range(3):
        ahead.request(owner, None, owner)
    ahead.cancel(2)
    assert ahead.take(0) == 0
    with pytest.raises(ValueError, match="one"):
        ahead.take(1)
    with pytest.raises(KeyError):
        ahead.take(2)
    ahead.close()


def test_nothing_runs_during_a_pause() -> None:
    running = threading.Event()

    def work(lane: int, owner: int, job: None) -> None:
        running.set()

    ahead = Ahead(work, 1)
    with ahead.pause():
        ahead.request(0, None, 0)
        assert not running.wait(0.2)
    assert running.wait(30)
    ahead.close()
