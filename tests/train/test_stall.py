"""``StallWatch`` in a user's own loop."""

from __future__ import annotations

import re

import pytest

from tests.cli.test_stall import CODES, missing
from tests.mpi import MpiRun

HEAD = """
import os, signal, sys, time
import torch
import hpcasync as ha
from hpcasync.comm import make_collectives
world = ha.init()
me = world.rank
torch.manual_seed(0)
net = torch.nn.Linear(3, 2)
def train(opt, steps, after=lambda: None):
    data = torch.Generator().manual_seed(me)
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(4, 3, generator=data)).square().sum().backward()
        opt.step()
        after()
"""

# The sum of the models hangs on one rank, in a backend of the user's: the others' models are summed in place meanwhile.
IN_THE_SUM = HEAD + """
class Stopping:
    def __init__(self, inner):
        self.inner, self.sums = inner, 0
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def allreduce(self, buffer):
        self.sums += 1
        if me == 1 and self.sums == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.inner.allreduce(buffer)
backend = Stopping(make_collectives("mpi", world))
opt = ha.KStep(torch.optim.SGD(net.parameters(), 0.01, momentum=0.9), every=5, block_momentum=0.5, collectives=backend)
def after():
    if opt._since == 0 and me == 0:
        torch.save([p.detach() for p in net.parameters()], "agreed.pt")
with opt, ha.StallWatch(opt, 2, "stalled.h5"):
    train(opt, 100, after)
"""

RESUMED = HEAD + """
opt = ha.KStep(torch.optim.SGD(net.parameters(), 0.01, momentum=0.9), every=5, block_momentum=0.5)
found = ha.load_checkpoint("stalled.h5", opt)
for p, agreed in zip(net.parameters(), torch.load("agreed.pt")):
    assert torch.equal(p, agreed)
assert opt.averages == 3 and opt._since == 0 and any("rank 0 had" in text for text in found.reset)
train(opt, 10)
opt.close()
print("done")
"""

IN_A_CHECKPOINT = HEAD + """
class Slow:
    def state_dict(self):
        if me == 2:
            time.sleep(10**6)
        return {}
opt = ha.Sync(torch.optim.SGD(net.parameters(), 0.01))
with opt, ha.StallWatch(opt, 2):
    train(opt, 3)
    ha.save_checkpoint("whole.h5", opt, slow=Slow())
"""

DIFFERENT = HEAD + """
opt = ha.Sync(torch.optim.SGD(net.parameters(), 0.01))
with opt, ha.StallWatch(opt, 2):
    train(opt, 3 + me)  # rank 1 makes one more, rank 0 averages buffers in its place
    opt.world.gather(1)
"""


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_the_sum_of_the_models_hangs(mpirun: MpiRun) -> None:
    done = mpirun(IN_THE_SUM, 2, check=False)
    assert done.returncode in CODES[mpirun.lane.name], done.stderr
    assert "stalled: rank 1 has not come to the average of the models of step 20, where rank 0 waited" in done.stderr
    assert "Checkpoint stalled.h5" in done.stderr and "the model after the last average" in done.stderr
    assert mpirun(RESUMED, 2).stdout.count("done") == 2


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_rank_that_hangs_in_a_checkpoint(mpirun: MpiRun) -> None:
    done = mpirun(IN_A_CHECKPOINT, 3, check=False)
    assert done.returncode in CODES[mpirun.lane.name], done.stderr
    assert re.search(missing(2, "a checkpoint after step 3"), done.stderr)
    assert "alive, in a checkpoint after step 3" in done.stderr and "time.sleep(10**6)" in done.stderr
    assert "No checkpoint: none was asked for" in done.stderr


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_ranks_that_part_are_told_from_one_that_hangs(mpirun: MpiRun) -> None:
    done = mpirun(DIFFERENT, 2, check=False)
    assert done.returncode in CODES[mpirun.lane.name], done.stderr
    assert "rank 0 waited for" in done.stderr and "in a gather after step 3, and no rank is missing" in done.stderr
    assert "; rank 1 in the average of the gradients of step 4" in done.stderr


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_it_is_for_ranks_in_step(mpirun: MpiRun) -> None:
    done = mpirun(HEAD + "ha.StallWatch(ha.Async(net, ha.rules.ASGD(lr=0.1)), 5)", 1, check=False)
    assert done.returncode != 0 and "StallWatch is for modes sync and kstep; found Async" in done.stderr
