"""Every mode with the model on a GPU, which all ranks share: the CPU's training, pinned memory, no wait that need not be.

Written without a GPU at hand; `tests/modes/test_staging.py` runs the same code over a device that a CPU plays.
"""

from __future__ import annotations

import pytest
import torch

from tests.mpi import MpiRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU here"),
]

HEAD = """
import contextlib
import numpy as np
import torch
import torch.nn.functional as F
import hpcasync as ha
from hpcasync.modes import staging
from tests.modes.toys import batch, mlp

world = ha.init(device="cuda")
P, me, gpu = world.size, world.rank, world.device
assert gpu.index == world.local_rank % torch.cuda.device_count(), gpu

def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

def rule(name):
    return ha.rules.make_rule(name, {"lr": 0.05})

# name: how to make it; whether ranks take turns, since the order of pushes decides
MAKERS = {
    "async": (lambda m: ha.Async(m, rule("trend-smooth")), True),
    "dc-asgd": (lambda m: ha.Async(m, rule("dc-asgd")), True),
    "easgd": (lambda m: ha.Async(m, rule("easgd")), True),
    "gsgm": (lambda m: ha.Async(m, rule("gsgm")), True),
    "sync": (lambda m: ha.Sync(sgd(m), model=m, bucket_mb=0.0002), False),
    "kstep": (lambda m: ha.KStep(sgd(m), model=m, every=3, block_momentum=0.5), False),
    "hierarchical": (lambda m: ha.modes.Hierarchical(m, ha.rules.ASGD(lr=0.05), every=4, groups=P), False),
    "delayed": (lambda m: ha.modes.Hierarchical(m, ha.rules.ASGD(lr=0.05), every=4, delay=2, groups=P), False),
}

def flat(model):
    return torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])

def step(opt, model, number, device, quiet=contextlib.nullcontext()):
    x, y = (t.to(device) for t in batch(number, me))
    with quiet:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

def run(make, turns, device, steps=12):
    model = mlp().to(device)
    opt = make(model)
    for number in range(steps):
        for rank in range(P) if turns else [me]:
            if rank == me:
                step(opt, model, number, device)
            if turns:
                world.collectives.barrier()
    opt.synchronize()
    found, shares = flat(model), opt.share.shares()
    opt.close()
    return found, shares
"""

SAME = """
for name, (make, turns) in MAKERS.items():
    (host, _), (device, shares) = (run(make, turns, d) for d in (torch.device("cpu"), gpu))
    assert torch.allclose(device, host, atol=1e-4), (name, (device - host).abs().max())
    assert abs(sum(shares.values()) - 1) < 1e-6 and shares["copy"] >= 0, (name, shares)
    print(name, {k: round(v, 3) for k, v in shares.items()})
print("done", flush=True)
"""

QUIET = """
class Quiet:
    "Inside, an operation of torch that makes the host wait for the GPU raises; waiting for a copy's event is none."
    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")
    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")

def staged_of(opt):
    if isinstance(opt, ha.Async):
        return [opt._staged, opt._gradients.staged]
    if isinstance(opt, ha.KStep):
        return [b._staged for b in opt._blocks]
    return [b._staged for b in opt._buckets]

copies = staging.copies_of(gpu)
assert copies.stream != torch.cuda.current_stream(gpu)
for backend in ("mpi", "window"):
    for name, (make, _) in MAKERS.items():
        if name == "sync":
            make = lambda m: ha.Sync(sgd(m), model=m, bucket_mb=0.0002, collectives=backend)
        if name == "kstep":
            make = lambda m: ha.KStep(sgd(m), model=m, every=3, block_momentum=0.5, collectives=backend)
        model = mlp().to(gpu)
        opt = make(model)
        for staged in staged_of(opt):
            assert staged.apart and staged.host.is_pinned() and staged.buffer.device == gpu, (backend, name)
        for number in range(4):
            step(opt, model, number, gpu, Quiet() if number and name != "kstep" else contextlib.nullcontext())
        if name == "kstep":  # whether a step's gradients are finite must be known before the step: one wait
            with Quiet():
                opt.average()
        opt.close()

# With much to compute the host is back long before the GPU is done: the step in between has waited for its gradients only.
staged = staging.Staged(torch.zeros(1 << 20, device=gpu))
big = torch.randn(4096, 4096, device=gpu)
torch.cuda.synchronize()
for _ in range(50):
    big = big @ big
    big /= big.norm()
staged.to_device()
staged.to_host()
assert not staged.arrived()
assert staged.wait() >= 0 and staged.arrived()
print("done", flush=True)
"""


@pytest.mark.parametrize("n", [1, 2])
def test_the_trajectory_of_the_cpu(mpirun: MpiRun, n: int) -> None:
    done = mpirun(HEAD + SAME, n, timeout=250)
    print(done.stdout)  # the split of a step's time: pytest -s
    assert done.stdout.count("done") == n


@pytest.mark.parametrize("n", [1, 2])
def test_pinned_and_no_wait_that_need_not_be(mpirun: MpiRun, n: int) -> None:
    assert mpirun(HEAD + QUIET, n, timeout=250).stdout.count("done") == n


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the streams are the same with both
def test_streams_are_ordered(mpirun: MpiRun) -> None:
    """torch's own sanitizer looks for two streams that touch a tensor in no order."""
    done = mpirun(HEAD + SAME, 1, env={"TORCH_CUDA_SANITIZER": "1"}, timeout=250)
    assert "possible data race" not in done.stdout + done.stderr
