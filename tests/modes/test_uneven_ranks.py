"""Ranks that are not alike: other state, other gradients, an early exit; nothing hangs and nobody is wrong in silence."""

from __future__ import annotations

import pytest

from tests.mpi import MpiRun

MPICH = pytest.mark.parametrize("lane", ["mpich"], indirect=True)


@MPICH
def test_inner_state_that_only_some_ranks_have_is_averaged_over_those(mpirun: MpiRun) -> None:
    code = """
    import torch, hpcasync as ha
    world = ha.init()
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    opt = ha.KStep(torch.optim.SGD([a, b], lr=0.1, momentum=0.9), every=1, inner_state="average")
    for step in range(3):
        opt.zero_grad()
        a.grad = torch.full((3,), float("nan") if step == 0 and world.rank == 1 else 1.0 + world.rank)
        if world.rank == 0:
            b.grad = torch.ones(2)  # no other rank has ever a gradient for it
        opt.step()
        if step == 0 and world.rank == 0:
            assert opt.state[a]["momentum_buffer"].tolist() == [2, 2, 2], opt.state[a]  # of ranks 0 and 2
    assert torch.allclose(opt.state[a]["momentum_buffer"], torch.tensor(world.gather(opt.state[a]["momentum_buffer"])[0]))
    assert opt.state[b].keys() == ({"momentum_buffer"} if world.rank == 0 else set())
    opt.close()
    print("fine")
    """
    done = mpirun(code, 3)
    assert done.stdout.count("fine") == 3


@pytest.mark.parametrize("mode", ["async", "sync", "kstep"])
def test_sys_exit_on_one_rank_ends_the_job(mpirun: MpiRun, mode: str) -> None:
    code = f"""
    import sys, torch, hpcasync as ha
    world = ha.init()
    model = torch.nn.Linear(4, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    make = {{"async": lambda: ha.Async(model, ha.rules.ASGD(lr=0.1), staleness=2), "sync": lambda: ha.Sync(sgd),
            "kstep": lambda: ha.KStep(sgd, every=2)}}
    opt = make["{mode}"]()
    for step in range(100):
        if step == 5 and world.rank == 1:
            sys.exit(3)
        opt.zero_grad(); model(torch.ones(1, 4)).sum().backward(); opt.step()
    opt.close()
    """
    done = mpirun(code, 2, check=False)
    assert done.returncode != 0


@MPICH
def test_sys_exit_on_every_rank_keeps_its_code(mpirun: MpiRun) -> None:
    done = mpirun("import sys, hpcasync; hpcasync.init(); sys.exit(4)", 2, check=False)
    assert done.returncode == 4


@MPICH
def test_bad_input_in_a_script_is_one_line_and_exit_code_2(mpirun: MpiRun) -> None:
    code = """
    import torch, hpcasync as ha
    ha.init()
    ha.Async(torch.nn.Linear(2, 2).double(), ha.rules.ASGD(lr=0.1))
    """
    done = mpirun(code, 3, check=False)
    assert done.returncode == 2
    assert done.stderr.count("hpcasync: error: weight is float64") == 1
    assert "program1.py:4" in done.stderr and "Traceback" not in done.stderr


@MPICH
def test_a_mean_that_overflows_is_skipped_by_all(mpirun: MpiRun) -> None:
    code = """
    import warnings, torch, hpcasync as ha
    world = ha.init()
    warnings.simplefilter("ignore")
    p = torch.nn.Parameter(torch.ones(2))
    opt = ha.Sync(torch.optim.SGD([p], lr=1.0))
    p.grad = torch.full((2,), 2.5e38)
    opt.step()
    assert opt.skipped == 1 and p.tolist() == [1, 1], (opt.skipped, p)
    opt.zero_grad(); (p * 2).sum().backward(); opt.step()
    assert opt.skipped == 1 and p.tolist() == [-1, -1]
    print("fine")
    """
    assert mpirun(code, 2).stdout.count("fine") == 2


@MPICH
def test_parameters_without_elements_and_buffers_beside_groups(mpirun: MpiRun) -> None:
    code = """
    import torch, hpcasync as ha
    world = ha.init()
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.linear, self.norm = torch.nn.Parameter(torch.zeros(0)), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
        def forward(self, x):
            return self.norm(self.linear(x)) + self.none.sum()
    for kind in ("async", "sync", "kstep"):
        model = Net()
        groups = [{"params": model.linear.parameters(), "lr": 0.1}, {"params": [model.none, *model.norm.parameters()]}]
        if kind == "async":
            opt = ha.Async(groups, ha.rules.ASGD(lr=0.05), model=model)
        else:
            sgd = torch.optim.SGD(groups, lr=0.05)
            opt = ha.Sync(sgd, model=model) if kind == "sync" else ha.KStep(sgd, every=2, model=model)
        torch.manual_seed(world.rank)
        for _ in range(5):
            opt.zero_grad(); model(torch.randn(8, 4)).square().sum().backward(); opt.step()
        opt.synchronize()
        state = {k: v.tolist() for k, v in model.state_dict().items()}
        assert all(other == state for other in world.gather(state)), kind
        opt.close()
    print("fine")
    """
    assert mpirun(code, 2).stdout.count("fine") == 2
