"""The modes over separate hosts: every rule trains, sync and kstep too, any node map, a failure ends the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcasync.errors import UsageError
from hpcasync.train.config import make_config
from tests.hosts import HostsRun
from tests.mpi import MpiRun

HEAD = """
import json, sys, time
import numpy as np
import torch
import torch.nn.functional as F
import hpcasync as ha
from hpcasync import rules
from tests.modes.toys import batch, flat, make, mlp, train

def same(array):
    return len({np.ascontiguousarray(a).tobytes() for a in world.gather(array)}) == 1
"""

TRAIN = """
# Every rule, by the command line's own code, one after the other in one job.
import contextlib, io
from hpcasync.cli import main
from hpcasync.rules import RULES
world = ha.init()
for name in RULES:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(["train", "--data", "digits", "--model", "logistic", "--epochs", "2", "--rule", name, "--json",
                     "--progress", "thread", "--output", sys.argv[1] + "/" + name])
    assert code == 0, name
    if world.rank == 0:
        result = json.loads(said.getvalue().strip().splitlines()[-1])
        assert result["nodes"] == 2 and result["ranks"] == 4, result
        assert result["test_accuracy"] > 0.4, result  # easgd is slow to begin; chance is 0.1
"""

UNEQUAL = """
# Every mode by the command line's code. One core for each node's ranks: too few for three, enough for one.
import contextlib, io, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from hpcasync.cli import main
world = ha.init()
assert world.gather(world.local_size) == [3, 3, 3, 1]
for words in (
    "async", "hierarchical --every 8 --block-momentum 0.5 --delay 2", "sync", "sync --collectives window",
    "kstep --every 8 --collectives window",
):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        folder = f"{sys.argv[1]}/{words}"
        code = main(["train", "--model", "logistic", "--epochs", "1", "--output", folder, "--mode", *words.split()])
    assert code == 0, words
"""

SYNC = """
# Sync and kstep: as on one node, the same bits on all ranks; sync is one step on the whole batch.
world = ha.init()
me, P = world.rank, world.size
for mode in ("sync", "kstep"):
    model = mlp(seed=me)
    opt = make(mode, model, None)
    train(opt, model, range(7), me)
    opt.synchronize()
    assert same(flat(model)), mode
    opt.close()
model, alone = mlp(), mlp()
opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
train(opt, model, range(5), me)
inner = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
for step in range(5):
    x, y = (torch.cat(parts) for parts in zip(*[batch(step, r) for r in range(P)]))
    inner.zero_grad()
    F.cross_entropy(alone(x), y).backward()
    inner.step()
for p, q in zip(model.parameters(), alone.parameters()):
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
opt.close()
"""

STATE = """
# The shared state is saved and comes back on all nodes; ranks take different numbers of steps; the default is probed.
opt = ha.Async(model := mlp(seed=me), rules.TrendSmooth(base="adam", lr=0.02), staleness=STALENESS)
assert opt.progress in ("thread", "library", "host-rank")
train(opt, model, range(4 + me), me)
opt.synchronize()
assert same(flat(model))
kept, w = opt.state_dict(), flat(model)
world.collectives.barrier()  # nobody trains on before all have it
assert kept["hpcasync"]["versions"] == [sum(4 + r for r in range(P))] * len(opt.store.layout.shards)
assert same(np.concatenate([v.numpy().ravel() for s in kept["state"].values() for v in s.values()]))
assert any(v.abs().max() > 0 for s in kept["state"].values() for v in s.values())
train(opt, model, range(3), me)
opt.synchronize()
assert not np.array_equal(flat(model), w)
with torch.no_grad():
    for p, v in zip(model.parameters(), np.split(w.view(np.float32), np.cumsum([p.numel() for p in model.parameters()])[:-1])):
        p.copy_(torch.from_numpy(v).view(p.shape))
opt.load_state_dict(kept)
again = opt.state_dict()
world.collectives.barrier()
assert np.array_equal(flat(model), w) and again["hpcasync"]["versions"] == kept["hpcasync"]["versions"]
for i, vectors in kept["state"].items():
    assert all(torch.equal(v, again["state"][i][name]) for name, v in vectors.items())
train(opt, model, range(3), me)
opt.close()
assert same(flat(model))
try:
    ha.Async(mlp(), rules.ASGD(), progress="WRONG")
    raise SystemExit("not refused")
except ha.UsageError as error:
    assert "WRONG" in str(error), error
"""


def run(hosts: HostsRun, n: int, body: str, workers: int | None = None, **options: object) -> None:
    done = hosts(HEAD + body + "\nprint('done', flush=True)\n", n, timeout=350, **options)  # type: ignore[arg-type]
    assert done.stdout.count("done") == (n if workers is None else workers)


@pytest.mark.slow
def test_every_rule_trains(two_hosts: HostsRun, tmp_path: Path) -> None:
    run(two_hosts, 4, TRAIN, args=[tmp_path])


def test_sync_and_kstep(two_hosts: HostsRun) -> None:
    run(two_hosts, 4, SYNC)


def state(staleness: str, hosts: str = "") -> str:
    return f"world = ha.init({hosts})\nme, P = world.rank, world.size\n" + STATE.replace("STALENESS", staleness)


def test_unequal_ranks_per_node(two_hosts: HostsRun) -> None:
    two_hosts.ranks = [3, 1]
    run(two_hosts, 4, state("3"))


def test_unequal_ranks_per_node_in_every_mode(two_hosts: HostsRun, tmp_path: Path) -> None:
    """Where one node's ranks have a core each and the other's have not."""
    two_hosts.ranks = [3, 1]
    run(two_hosts, 4, UNEQUAL, args=[tmp_path])


def test_host_ranks(two_hosts: HostsRun) -> None:
    """One rank of each node only serves: the workers are two."""
    body = state("3", "host_ranks=1") + "assert world.size == 2 and world.nodes == 2 and opt.progress == 'host-rank'\n"
    run(two_hosts, 4, body, workers=2)


def test_host_ranks_that_do_not_fit(two_hosts: HostsRun) -> None:
    two_hosts.ranks = [3, 1]
    done = two_hosts.cli(["train", "--progress", "host-rank", "--output", "out"], 4, check=False)
    assert done.returncode == 2 and "host_ranks=1" in done.stderr and "[3, 1]" in done.stderr
    assert done.stderr.count("every node needs at least one more") == 1 and "Traceback" not in done.stderr


def test_bad_input_with_host_ranks_ends_all(two_hosts: HostsRun) -> None:
    done = two_hosts.cli(["train", "--progress", "host-rank", "--data", "nowhere.h5"], 4, check=False)
    assert done.returncode == 2 and done.stderr.count("nowhere.h5") == 1, done.stderr


def test_a_failing_rank_ends_the_job(two_hosts: HostsRun) -> None:
    body = """
world = ha.init()
opt = ha.Async(model := mlp(), rules.ASGD(), progress="thread")
for step in range(1000000):
    if world.rank == 3 and step == 5:
        raise RuntimeError("this rank fails")
    train(opt, model, range(1), world.rank)
"""
    done = two_hosts(HEAD + body, 4, check=False, timeout=200)
    assert done.returncode != 0
    assert "rank 3 of 4 failed" in done.stderr and "this rank fails" in done.stderr


def test_options_that_do_not_fit() -> None:
    assert make_config({"progress": "host-rank"}).host_ranks == 1
    for keys, says in (
        ({"host_ranks": 1}, "--progress host-rank"),
        ({"progress": "thread", "host_ranks": 1}, "--progress host-rank"),
        ({"progress": "host-rank", "host_ranks": 0}, "at least 1|>= 1"),
        ({"progress": "threads"}, "thread"),
        ({"progress": "thread", "mode": "sync"}, "belongs to mode async"),
    ):
        with pytest.raises(UsageError, match=says):
            make_config(keys)


RESHARD = """
world = ha.init()
for name in ("trend-smooth", "gsgm", "easgd", "dc-asgd"):
    model, path = mlp(), f"{sys.argv[2]}/{name}.h5"
    opt = ha.Async(model, ha.rules.make_rule(name, {"lr": 0.05}), world=world)
    if sys.argv[1] == "save":
        train(opt, model, range(5), world.rank)
        ha.save_checkpoint(path, opt)
    else:
        reset = ha.load_checkpoint(path, opt).reset
        assert opt.steps == 5
        said = any("last_gradient of rule gsgm" in what for what in reset)
        assert said == (name == "gsgm"), (name, reset)
        assert min(opt.store.shard_versions()) >= 10 or name == "easgd", name  # the other rank may go on already
        train(opt, model, range(5, 9), world.rank)
        opt.synchronize()
        assert np.isfinite(flat(model)).all(), name
    shards = len(opt.store.layout.shards)
    opt.close()
if world.rank == 0:
    print(f"shards: {shards}", flush=True)
"""


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # it can say that the ranks of one machine are on different nodes
def test_a_checkpoint_goes_to_other_nodes_with_other_shards(mpirun: MpiRun, tmp_path: Path) -> None:
    apart, found = {"MPIR_CVAR_NOLOCAL": "1"}, []
    for what, env, n in (("save", apart, 2), ("load", {}, 2), ("save", {}, 2), ("load", apart, 2), ("load", apart, 3)):
        found.append(mpirun(HEAD + RESHARD, n, args=[what, tmp_path], env=env).stdout.count("shards: 2"))
    assert found == [1, 0, 0, 1, 0]


PRIVATE = """
# gsgm's last gradients lie at the owners of the shards, on all nodes: after a checkpoint the run goes on with the same bits.
world = ha.init()
me, P = world.rank, world.size
opt = ha.Async(model := mlp(), ha.rules.make_rule("gsgm", {"lr": 0.05}), world=world)
store, worker = opt.store, opt._worker
assert store._slots.peers and len(opt.rule.private_vectors) == 1

def take_turns(steps):
    for step in steps:
        for rank in range(P):
            if rank == me:
                train(opt, model, range(step, step + 1), me)
            store.barrier()

def bits():
    found = [store.own_vectors(worker), store.snapshot(worker), store.shard_notes(), np.array(store.shard_versions())]
    store.barrier()
    return [part.tobytes() for part in found]

take_turns(range(3))
opt.synchronize()  # a load pulls anew too
ha.save_checkpoint(sys.argv[1], opt)
kept = bits()
assert np.abs(store.own_vectors(worker)).max() > 0 and (store.shard_notes()[:, 0] == P).all()
store.barrier()
take_turns(range(3, 6))
went, after = flat(model), bits()
assert all(a != b for i, (a, b) in enumerate(zip(kept, after)) if i != 2)
for again in range(2):
    assert not [what for what in ha.load_checkpoint(sys.argv[1], opt).reset if "gsgm" in what]
    assert bits() == kept
    take_turns(range(3, 6))
    assert np.array_equal(flat(model), went) and bits() == after
opt.close()
"""


def test_vectors_of_the_workers_survive_a_checkpoint(two_hosts: HostsRun, tmp_path: Path) -> None:
    run(two_hosts, 4, PRIVATE, args=[tmp_path / "gsgm.h5"])
