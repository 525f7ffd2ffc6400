"""Staging: free on a CPU; on a device, here a CPU whose copies are late, the same training to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcasync import load_checkpoint, rules, save_checkpoint
from hpcasync.modes import Async, Hierarchical, KStep, Mode, Sync, kstep, staging, sync
from hpcasync.modes.finite import device_finite
from hpcasync.modes.staging import Staged
from tests.modes.late import LateCopies, late
from tests.modes.toys import batch, flat, mlp, train
from tests.mpi import MpiRun

Make = Callable[[torch.nn.Module], Mode]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


MAKERS: dict[str, Make] = {
    "async": lambda m: Async(m, rules.TrendSmooth(base="momentum", lr=0.05)),
    "bound": lambda m: Async(m, rules.ASGD(lr=0.05), staleness=0),
    "easgd": lambda m: Async(m, rules.EASGD(lr=0.05, period=3)),
    "sync": lambda m: Sync(sgd(m), model=m, bucket_mb=0.0002),
    "kstep": lambda m: KStep(sgd(m), model=m, every=3, block_momentum=0.5),
    "hierarchical": lambda m: Hierarchical(m, rules.ASGD(lr=0.05), every=4, block_momentum=0.5),
    "delayed": lambda m: Hierarchical(m, rules.ASGD(lr=0.05), every=4, delay=2),
}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    monkeypatch.setattr(staging, "copies_of", staging.copies_of)  # brought back afterwards
    return late()


def test_on_a_cpu_it_is_nothing() -> None:
    buffer = torch.arange(5.0)
    for staged in (Staged(buffer), Staged.beside(buffer, torch.device("cpu"))):
        assert staged.host is staged.buffer is buffer and not staged.apart
        staged.to_host()
        staged.to_device()
        assert staged.arrived() and staged.wait() == 0.0
        assert np.shares_memory(staged.array, buffer.numpy())


def test_copies_end_in_order_and_are_waited_for(copies: LateCopies) -> None:
    staged = Staged(torch.arange(4.0))
    assert staged.apart and not np.shares_memory(staged.array, staged.buffer.numpy())
    staged.to_host()
    assert not staged.arrived() and np.isnan(staged.array).all()
    while not staged.arrived():
        pass
    assert staged.array.tolist() == [0, 1, 2, 3]
    assert 0 <= staged.wait() < 1 and staged.wait() == 0.0
    staged.array[:] = 7
    staged.to_device()
    assert staged.buffer.tolist() == [7] * 4
    staged.array[0] = 1
    with pytest.raises(AssertionError, match="changed what was being copied"):
        staged.wait()


def steps(opt: Mode, model: torch.nn.Module, more: Callable[[int], None] = lambda step: None) -> list[np.ndarray]:
    """The model after each step, with a parameter frozen for a while, and others without a gradient."""
    found = []
    for step in range(12):
        for p in model[2].parameters():  # type: ignore[index]
            p.requires_grad_(not 4 <= step < 7)
        train(opt, model, range(step, step + 1))
        if step in (5, 9):
            opt.synchronize()
        more(step)
        found.append(flat(model))
    opt.synchronize()
    return [*found, flat(model)]


def sum_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the backend summed on the device, which the CPU plays."""
    for module in (sync, kstep):
        monkeypatch.setattr(module, "on_host", lambda memory: False)


@pytest.mark.parametrize("name", [*MAKERS, "sync direct", "kstep direct"])
def test_the_same_bits_with_late_copies(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, _, direct = name.partition(" ")
    plain = mlp()
    opt = MAKERS[name](plain)
    expected = steps(opt, plain)
    opt.close()
    assert opt.share.copy == 0.0 and set(opt.share.shares()) == {"compute", "communicate", "wait"}

    monkeypatch.setattr(staging, "copies_of", staging.copies_of)
    copies, model = late(), mlp()
    if direct:
        sum_on_device(monkeypatch)
    opt = MAKERS[name](model)

    def save_and_load(step: int) -> None:
        if step == 8:
            save_checkpoint(tmp_path / "x.h5", opt)
            load_checkpoint(tmp_path / "x.h5", opt)

    found = steps(opt, model, save_and_load)
    assert [np.array_equal(a, b) for a, b in zip(expected, found, strict=True)] == [True] * len(expected)
    assert copies.begun >= 12 // (3 if name == "kstep" else 1)
    assert direct or opt.share.copy > 0
    assert sum(opt.share.shares().values()) == pytest.approx(1)
    opt.close()
    assert not copies.open


def test_gradients_are_taken_as_they_are_at_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped after backward, by whatever means, in any layout; a gradient that is not finite skips the step."""

    def clipped() -> np.ndarray:
        model = mlp()
        opt = Async(model, rules.ASGD(lr=0.1))
        for step in range(3):
            x, y = batch(step)
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.data.clamp_(-0.01, 0.01)
                p.grad = p.grad.mT.contiguous().mT if p.grad.dim() > 1 else p.grad
            opt.step()
        before = flat(model)
        model[0].weight.grad = torch.full((9, 6), torch.nan)
        with pytest.warns(RuntimeWarning, match="NaN or infinity"):
            opt.step()
        assert opt.skipped == 1 and np.array_equal(flat(model), before)
        opt.close()
        return before

    expected = clipped()
    monkeypatch.setattr(staging, "copies_of", staging.copies_of)
    late()
    assert np.array_equal(clipped(), expected)


def test_gradients_of_a_device_are_finite_or_not() -> None:
    huge = torch.full((1000,), 3e38)  # its norm is not finite
    good = [torch.ones(3, 2), huge, torch.ones(4, dtype=torch.float64), torch.zeros(0)]
    assert device_finite([]) and device_finite(good)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not device_finite([*good, torch.tensor([0.0, value])])
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([torch.nan]), (3,), check_invariants=True)
    assert not device_finite([sparse])


@pytest.mark.parametrize("direct", [False, True])
def test_a_mean_that_is_not_finite_is_no_single_ranks(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite on each rank, but not their sum: all are named; otherwise those that sent it."""
    monkeypatch.setattr(staging, "copies_of", staging.copies_of)
    late()
    if direct:
        sum_on_device(monkeypatch)
    params: list[Tensor] = [torch.zeros(3), torch.zeros(2)]
    for sums, flags, bad in (
        ([1.0, 2, 3, 4, 5], [0.0, 0], [0.0, 0]),
        ([1.0, 2, 3, torch.inf, 5], [0.0, 0], [1.0, 1]),
        ([1.0, 2, 3, torch.nan, 5], [0.0, 1], [0.0, 1]),
    ):
        bucket = sync._Bucket([0, 1], params, torch.tensor([*sums, 2, 0, *flags]), rank=0)
        bucket.average(2)
        bucket.settle()
        assert bucket.hand_out(params).tolist() == bad
        assert params[1].grad is None and params[0].grad is not None and params[0].grad.tolist() == [0.5, 1, 1.5]


RANKS = """
import sys
import numpy as np
import torch
import torch.nn.functional as F
import hpcasync as ha
from hpcasync.modes import kstep, staging, sync
from tests.modes.late import late
from tests.modes.toys import batch, flat, mlp, train

world = ha.init(device="cpu")
P, me, real = world.size, world.rank, staging.copies_of

def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

def run(make, turns):
    model = mlp()
    opt = make(model)
    for step in range(8):
        for rank in range(P) if turns else [me]:
            if rank == me:
                if step == 4 and me == 1:
                    opt.zero_grad()
                    F.cross_entropy(model(batch(step, me)[0]), batch(step, me)[1]).backward()
                    model[0].weight.grad = None  # on one rank only
                    opt.step()
                elif step == 6 and me == 1 and isinstance(opt, ha.Sync):
                    opt.zero_grad()
                    (F.cross_entropy(model(batch(step, me)[0]), batch(step, me)[1]) * np.nan).backward()
                    opt.step()
                else:
                    train(opt, model, range(step, step + 1), me)
            if turns:
                world.collectives.barrier()
    opt.synchronize()
    assert opt.skipped == isinstance(opt, ha.Sync)
    opt.close()
    return flat(model)

makers = {
    f"{mode} {backend}": (make, False)
    for backend in ("mpi", "window", "torch")
    for mode, make in {
        "sync": lambda m, b=backend: ha.Sync(sgd(m), model=m, bucket_mb=0.0002, collectives=b),
        "kstep": lambda m, b=backend: ha.KStep(sgd(m), model=m, every=3, block_momentum=0.5, collectives=b),
    }.items()
}
makers["async"] = lambda m: ha.Async(m, ha.rules.make_rule("trend-smooth", {"lr": 0.05})), True
makers["gsgm"] = lambda m: ha.Async(m, ha.rules.make_rule("gsgm", {"lr": 0.05})), True
makers["hierarchical"] = lambda m: ha.modes.Hierarchical(m, ha.rules.ASGD(lr=0.05), every=4, delay=2, groups=P), False
where = sync.on_host, lambda memory: False
for name, (make, turns) in makers.items():
    staging.copies_of = real
    sync.on_host = kstep.on_host = where[0]
    plain = run(make, turns)
    for sync.on_host in where if " mpi" in name else where[:1]:  # the second as if the backend summed on the device
        kstep.on_host = sync.on_host
        copies = late()
        staged = run(make, turns)
        assert copies.begun > 2, name
        assert np.array_equal(plain, staged), name
print("done", flush=True)
"""


def test_ranks_with_late_copies(mpirun: MpiRun) -> None:
    """Every backend that sums on the host, and the window: the bits of ranks that copy nothing."""
    assert mpirun(RANKS, 2, timeout=250).stdout.count("done") == 2


