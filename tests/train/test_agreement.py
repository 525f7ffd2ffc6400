"""How ranks in step ask each other for signals: how often, waiting for nobody, and stopping at one step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcasync.comm import World
from hpcasync.train import in_step
from tests.mpi import MpiRun


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
    monkeypatch.setattr(in_step, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    comm = OneRank()
    looks: Any = in_step.InStep(SimpleNamespace(everyone=replace(World(), comm=comm)))  # type: ignore[arg-type]
    for epoch in range(3):
        for _ in range(4):
            clock[0] += 1.0  # seconds of a step
            looks.wanted(False)
        clock[0] += 1e-6
        assert not looks.asked_to_stop()
        assert comm.questions == 5 * (epoch + 1)


def test_quick_steps_are_asked_about_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(in_step, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    comm = OneRank()
    looks: Any = in_step.InStep(SimpleNamespace(everyone=replace(World(), comm=comm)))  # type: ignore[arg-type]
    for _ in range(10_000):
        clock[0] += 0.001
        looks.wanted(False)
    assert 39 <= comm.questions <= 42  # in 10 seconds


OVERLAPPED = """
import os, random, signal, time
from types import SimpleNamespace
import numpy as np
import hpcasync as ha
from hpcasync.train import in_step, signals
world = ha.init()
signals.install()
in_step.LOOK_SECONDS = 0.0  # ask at every step
me, word = world.rank, np.zeros(1)

def free(n):
    return n % 6 > 2  # no average is under way after step n

# Rank 0 makes all its steps while rank 1 is still before its first.
looks = in_step.Overlapped(SimpleNamespace(everyone=world, under_way=False))
if me == 1:
    world.comm.Recv(word, source=0)
for _ in range(50):
    assert not looks.wanted(False)
if me == 0:
    world.comm.Send(word, dest=1)
assert not looks.asked_to_stop()
looks.close()

def run(seed):
    "What a rank has decided and where, in a run of two epochs in which one rank gets a signal at a step, perhaps after the end."
    both, own = random.Random(seed), random.Random(f"{seed} {me}")
    steps, every = both.randint(5, 25), both.choice([0, 4, 7])
    sender, when = both.randrange(world.size), both.randint(1, 2 * steps + 10)
    mode, said, n = SimpleNamespace(everyone=world, under_way=False), [], 0
    signals.forget()
    looks = in_step.Overlapped(mode)
    for epoch in range(2):
        for _ in range(steps):
            n += 1
            time.sleep(own.choice([0, 0, 0, 0.001, 0.003]))
            mode.under_way = not free(n)
            if (me, n) == (sender, when):
                os.kill(os.getpid(), signal.SIGUSR1)
            due = every > 0 and n % every == 0
            if looks.wanted(due):
                decision = looks.decide(due)
                said.append((n, decision.stop, decision.save))
                assert world.gather(n) == [n] * world.size  # as a save does
                assert decision.save and (not decision.stop or free(n) and n >= when)
                if decision.stop:
                    return looks, said, when, 2 * steps
        said.append((n, looks.asked_to_stop(), "end"))
        if said[-1][1]:
            assert n >= when
            return looks, said, when, 2 * steps
        world.comm.Barrier()
    return looks, said, when, 2 * steps

for seed in range(20):
    looks, said, when, last = run(seed)
    looks.close()
    assert world.gather(said) == [said] * world.size, (seed, said)
    assert said[-1][1] == (when <= last), (seed, when, said)
print("done\\n", end="")
"""


def test_ranks_that_wait_for_nobody_stop_at_the_same_step(mpirun: MpiRun) -> None:
    done = mpirun(OVERLAPPED, n=3, timeout=250)
    assert done.stdout.count("done") == 3
