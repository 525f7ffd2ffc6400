"""An exception on one rank ends the job, with its traceback, wherever the others are."""

from __future__ import annotations

import pytest

from tests.mpi import MpiRun, processes_of

HEAD = """
import threading, time, sys
import numpy as np
import torch
import hpcasync as ha
world = ha.init()
me = world.rank

def wait_for_ever():
    world.collectives.barrier()

def train(make, steps=10**9):
    model = torch.nn.Linear(3, 2)
    opt = make(model)
    for i in range(steps):
        opt.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        if me == 1 and i == 3:
            boom()
        opt.step()

def boom():
    raise KeyError("the needle")
"""

WAYS = {
    "barrier": "boom() if me == 1 else wait_for_ever()",
    "blocking gather": "boom() if me == 1 else world.gather(1)",
    "sync training": "train(lambda m: ha.Sync(torch.optim.SGD(m.parameters(), lr=0.1)))",
    "kstep training": "train(lambda m: ha.KStep(torch.optim.SGD(m.parameters(), lr=0.1), every=2))",
    "async training": "train(lambda m: ha.Async(m, ha.rules.ASGD(lr=0.1), staleness=1))",
    "thread": """
if me == 1:
    threading.Thread(target=boom).start()
wait_for_ever()
""",
    "closed stdout": """
if me == 1:
    print("unwritten", end="")
    sys.stdout.close()
    boom()
wait_for_ever()
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_exception_on_one_rank_ends_the_job(mpirun: MpiRun, way: str) -> None:
    done = mpirun(HEAD + WAYS[way], 2, check=False)  # rank 0 waits for ever
    assert done.returncode != 0
    assert "hpcasync: rank 1 of 2 failed" in done.stderr
    assert (
        "Traceback" in done.stderr and "in boom" in done.stderr and "KeyError: 'the needle'" in done.stderr
    )
    assert "rank 0 of 2 failed" not in done.stderr
    assert processes_of(mpirun.last_token) == []


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_one_rank_fails_like_any_python(mpirun: MpiRun) -> None:
    done = mpirun(HEAD + "me == 0 and boom()", 1, check=False)
    assert done.returncode == 1 and "KeyError: 'the needle'" in done.stderr
