"""The store in shared-memory windows, under a real mpiexec: no lost update, no torn read, exact sequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcasync.store.window import _shared_memory_problem
from tests.mpi import MpiRun

HEAD = """
import time
import numpy as np
import hpcasync as ha
from hpcasync.rules import ASGD
from hpcasync.store import WindowStore, make_layout
from tests.store.helpers import gradient, rule, sequential, small_layout, start

world = ha.init()
P, me = world.size, world.rank

def counting(sizes, shard, threads=1):
    "lr 1 and gradients of -1: every push adds exactly 1."
    store = WindowStore(world, make_layout(sizes, shard), ASGD(lr=1.0), threads=threads)
    if me == 0:
        store.start_state(np.zeros(store.layout.total, np.float32))
    store.barrier()
    grads = [np.full(size, -1, np.float32) for size in sizes]
    hypers = [store.rule.hyper(store.rule.group_options())] * len(sizes)
    return store, store.worker(me), grads, hypers, np.zeros(store.layout.total, np.float32)

def values(store, out):
    "The distinct values in each shard, gaps left out."
    return [{float(v) for p in s.pieces for v in out[p.start : p.start + p.size]} for s in store.layout.shards]
"""


def run(mpirun: MpiRun, n: int, body: str, timeout: float = 200) -> None:
    done = mpirun(HEAD + body + "\nprint('done', flush=True)\n", n, timeout=timeout)
    assert done.stdout.count("done") == n


COUNTS = """
# Every rank pushes; between its pushes it pulls: values inside a shard are equal, and never go back.
for threads, sizes, shard, pushes in ((1, [3, 100, 30], 16, 60), (2, [3, 5000, 30], 700, 40), (1, [7], 16, 150)):
    store, worker, grads, hypers, out = counting(sizes, shard, threads)
    last = np.zeros(len(store.layout.shards))
    for i in range(pushes):
        store.push_pull(worker, grads, out, hypers)
        store.pull(worker, out)
        seen = values(store, out)
        assert all(len(v) == 1 for v in seen), seen
        now = np.array([v.pop() for v in seen])
        assert (now >= last).all() and (now >= i + 1).all()
        last = now
    store.barrier()
    store.pull(worker, out)
    assert values(store, out) == [{float(P * pushes)}] * len(store.layout.shards)
    assert store.versions.tolist() == [P * pushes] * len(store.layout.shards)
    assert all(0 <= w < P for w in store.writers)
    assert store.clocks.tolist() == [pushes] * P
    taus = np.array(world.gather(worker.staleness.counts.sum()))
    assert (taus == pushes * len(store.layout.shards)).all()
    store.close()
    store.close()
"""

READER = """
# Ranks 1.. push with no pause until rank 0 has read 40 times, and several values: never two values inside a shard.
store, worker, grads, hypers, out = counting([40000, 3, 20000], 30000)
pushes = 0
if me == 0:
    distinct, reads = set(), 0
    while reads < 40 or len(distinct) < 4:
        store.pull(worker, out)
        seen = values(store, out)
        assert all(len(v) == 1 for v in seen), [sorted(v)[:4] for v in seen]
        distinct |= {min(v) for v in seen}
        reads += 1
    store.clocks[0] = 40
else:
    while store.clocks[0] < 40:
        store.push_pull(worker, grads, out, hypers)
        pushes += 1
store.barrier()
store.pull(worker, out)
assert values(store, out) == [{float(sum(world.gather(pushes)))}] * len(store.layout.shards)
store.close()
"""

TURNS = """
# The ranks take turns: bit for bit the sequential reference, with its staleness.
for threads, shard in ((1, 128), (2, 64), (1, 10**6)):
    layout, the_rule = small_layout(shard), rule()
    store = WindowStore(world, layout, the_rule, threads=threads)
    if me == 0:
        store.start_state(start())
    store.barrier()
    worker, out = store.worker(me), start()
    hypers = [the_rule.hyper(the_rule.group_options())] * len(layout.sizes)
    turns = [(step, r) for step in range(4) for r in range(P)]
    for step, r in turns:
        if r == me:
            store.push_pull(worker, gradient(step, r, out), out, hypers)
        store.barrier()
    taus = {(s, r): (r if s == 0 else P - 1) for s, r in turns}
    expected = sequential(turns, P, taus)
    assert np.array_equal(out.view(np.int32), expected[me].view(np.int32)), np.abs(out - expected[me]).max()
    counts = np.bincount([taus[t] for t in turns if t[1] == me]) * len(layout.shards)
    assert worker.staleness.counts[: counts.size].tolist() == counts.tolist()
    assert worker.staleness.counts.sum() == counts.sum()
    assert store.writers.tolist() == [P - 1] * len(layout.shards)
    store.barrier()
    store.close()
"""

BOUND = """
# One slow rank, a bound: after the gate nobody is more than the bound ahead; the fast ranks use it up, and wait.
for bound in (0, 3):
    store, worker, grads, hypers, out = counting([5, 5], 16)
    ahead = []
    for step in range(15):
        while me == P - 1 and store.clocks[:me].min() < min(step + bound + 1, 15):
            time.sleep(0.001)
        if me == P - 1:
            time.sleep(0.01)
        store.push_pull(worker, grads, out, hypers)
        store.gate(worker, bound)
        ahead.append(int(store.clocks[me] - store.clocks.min()))
    assert max(ahead) <= bound, ahead
    assert (max(ahead) > 0) == (bound > 0 and me < P - 1), ahead
    assert sum(world.gather(worker.waited)) > 0.05
    store.barrier()
    assert store.clocks.tolist() == [15] * P
    store.close()
"""


def test_four_ranks(mpirun: MpiRun) -> None:
    run(mpirun, 4, COUNTS + READER + BOUND)


def test_taking_turns_equals_the_sequential_reference(mpirun: MpiRun) -> None:
    run(mpirun, 3, TURNS)


def test_one_rank(mpirun: MpiRun) -> None:
    run(mpirun, 1, COUNTS + TURNS)


@pytest.mark.parametrize("lane", ["mpich", "openmpi"], indirect=True)
def test_eight_ranks_on_few_cores_and_one_tiny_shard(mpirun: MpiRun) -> None:
    body = """
        store, worker, grads, hypers, out = counting([1], 16)
        for _ in range(50):
            store.push_pull(worker, grads, out, hypers)
        store.barrier()
        store.pull(worker, out)
        assert out[0] == 50 * P, out[0]
        store.close()
    """
    run(mpirun, 8, body.replace("\n        ", "\n"), timeout=250)


def test_shared_memory_too_small(tmp_path: Path) -> None:
    assert _shared_memory_problem(1, str(tmp_path)) is None
    assert _shared_memory_problem(1, str(tmp_path / "none")) is None
    problem = _shared_memory_problem(1 << 60, str(tmp_path))
    assert problem is not None and str(tmp_path) in problem
    assert f"needs {(1 << 40)} MiB" in problem and "--shm-size" in problem


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_window_larger_than_shared_memory_is_refused_on_every_rank(mpirun: MpiRun) -> None:
    """A window of 4 PB: the layout alone is cheap, nothing is allocated."""
    body = """
        try:
            WindowStore(world, make_layout([1 << 50], 1 << 49), ASGD(lr=1.0))
            raise SystemExit("not refused")
        except ha.UsageError as error:
            assert "rank 0: /dev/shm has" in str(error), error
    """
    run(mpirun, 2, body.replace("\n        ", "\n"))


BURIED = """
# Rank 1 ends while it holds locks, with the smallest clock: a lock, the bound on staleness and the turn are given free.
store, worker, grads, hypers, out = counting([40], 10)
if me == 1:
    assert store.try_lock(0, me) and store.try_lock(2, me)
else:
    for _ in range(3):
        store.tick(worker)
store.barrier()
if me == 0:
    assert store._ahead(worker) == 3 and not store.try_lock(0, me)
    torn = store.bury(1)
    assert [(of.shard, of.version) for of in torn] == [(0, 1), (2, 1)] and torn[0].state.shape == (1, 16), torn
    assert not store.gate(worker, 0)
    store.push_pull(worker, grads, out, hypers)
    assert store.versions.tolist() == [2, 1, 2], store.versions  # what the dead rank held counts as an update, of unknown content
    assert values(store, out) == [{1.0}] * 3, values(store, out)
    assert store.bury(1) == []
store.barrier()
store.close()
"""


def test_what_a_dead_rank_held_is_given_free(mpirun: MpiRun) -> None:
    run(mpirun, 2, BURIED)
