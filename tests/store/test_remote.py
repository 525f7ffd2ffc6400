"""The store across nodes, on separate hosts and with every rank a node of its own: exactly once, whole reads, exact sequences."""

from __future__ import annotations

from tests.hosts import HostsRun
from tests.mpi import MpiRun

HEAD = """
import time
import numpy as np
import hpcasync as ha
from hpcasync.rules import ASGD
from hpcasync.store import RemoteStore, make_layout
from tests.store.helpers import gradient, small_layout, start
from tests.store.methods import RULES, fits, replay, turns_of

world = ha.init()
P, me = world.size, world.rank
assert world.nodes == NODES, world

def counting(sizes, shard, **options):
    "lr 1 and gradients of -1: every push adds exactly 1."
    store = RemoteStore(world, make_layout(sizes, shard), ASGD(lr=1.0), **options)
    store.publish(np.zeros(store.layout.total, np.float32))
    grads = [np.full(size, -1, np.float32) for size in sizes]
    hypers = [store.rule.hyper(store.rule.group_options())] * len(sizes)
    return store, store.worker(me), grads, hypers, np.zeros(store.layout.total, np.float32)

def values(store, out):
    "The distinct values in each shard, gaps left out."
    return [{float(v) for p in s.pieces for v in out[p.start : p.start + p.size]} for s in store.layout.shards]
"""

COUNTS = """
# Every rank pushes; between its pushes it pulls: values inside a shard are equal, and never go back.
for sizes, shard, pushes, threads in (([3, 100, 30], 16, 12, 1), ([3, 50000, 30], 7000, 8, 2)):
    store, worker, grads, hypers, out = counting(sizes, shard, threads=threads)
    assert {p.node for p in store.ports} == set(range(world.nodes))
    last = np.zeros(len(store.layout.shards))
    for i in range(pushes):
        store.push_pull(worker, grads, out, hypers)
        if i % 2:
            store.pull(worker, out)
        seen = values(store, out)
        assert all(len(v) == 1 for v in seen), seen
        now = np.array([v.pop() for v in seen])
        assert (now >= last).all() and (now >= i + 1).all()
        last = now
    store.barrier()
    store.pull(worker, out)
    assert values(store, out) == [{float(P * pushes)}] * len(store.layout.shards)
    assert store.shard_versions() == [P * pushes] * len(store.layout.shards)
    store.look()
    assert store.clocks.tolist() == [pushes] * P
    assert (np.array(world.gather(worker.staleness.counts.sum())) == pushes * len(store.layout.shards)).all()
    assert (store.snapshot(worker)[0] == out).all()
    store.barrier()
    store.close()
    store.close()
"""

READER = """
# The other ranks push with no pause until rank 0 has read 25 times: never two values inside a shard.
store, worker, grads, hypers, out = counting([40000, 3, 20000], 30000)
pushes = 0
if me == 0:
    distinct = set()
    for _ in range(25):
        store.pull(worker, out)
        seen = values(store, out)
        assert all(len(v) == 1 for v in seen), [sorted(v)[:4] for v in seen]
        distinct |= {min(v) for v in seen}
    store.set_clock(0, 40)
    assert len(distinct) > 3, distinct
else:
    while store.look() or store.clocks[0] < 40:
        store.push_pull(worker, grads, out, hypers)
        pushes += 1
store.barrier()
store.pull(worker, out)
assert values(store, out) == [{float(sum(world.gather(pushes)))}] * len(store.layout.shards)
store.barrier()
store.close()
"""

TURNS = """
# Every rule, the ranks taking turns: bit for bit the sequential reference.
def equal(a, b):
    return np.array_equal(a.view(np.int32), b.view(np.int32))
for rule in RULES:
    if not fits(rule, P):
        continue
    store = RemoteStore(world, small_layout(), rule)
    store.publish(start())
    worker, out = store.worker(me), start()
    hypers = [rule.hyper(rule.group_options())] * len(store.layout.sizes)
    turns = turns_of(P)
    for step, rank in turns:
        if rank == me:
            assert store.may_push(worker)
            store.push_pull(worker, gradient(step, rank, out), out, hypers)
        store.barrier()
    copies, w = replay(rule, turns, P)
    assert equal(out, copies[me]), rule
    assert equal(store.snapshot(worker)[0], w), rule
    store.barrier()
    store.close()
"""

BOUND = """
# One slow rank, a bound: after the gate nobody is more than the bound ahead; the fast ranks do wait.
for bound in (0, 3):
    store, worker, grads, hypers, out = counting([5, 5], 16)
    ahead = []
    for _ in range(8):
        if me == P - 1:
            time.sleep(0.02)
        store.push_pull(worker, grads, out, hypers)
        store.gate(worker, bound)
        ahead.append(int(store.clocks[me] - store.clocks.min()))
    assert max(ahead) <= bound, ahead
    store.barrier()
    store.look()
    assert store.clocks.tolist() == [8] * P
    assert sum(world.gather(worker.waited)) > 0.05
    store.barrier()
    store.close()
"""


def run(mpirun: MpiRun, n: int, nodes: int, body: str, timeout: float = 150, **options: object) -> None:
    head = HEAD.replace("NODES", str(nodes))
    done = mpirun(head + body + "\nprint('done', flush=True)\n", n, timeout=timeout, **options)  # type: ignore[arg-type]
    assert done.stdout.count("done") == n


def test_two_hosts(two_hosts: HostsRun) -> None:
    run(two_hosts, 4, 2, COUNTS + READER + BOUND)


def test_two_hosts_taking_turns(two_hosts: HostsRun) -> None:
    run(two_hosts, 4, 2, TURNS)
