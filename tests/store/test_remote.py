"""The store across nodes, on separate hosts and with every rank a node of its own: exactly once, whole reads, exact sequences."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.store import IDLE, make_layout, shard_size
from hpcasync.store.placement import Segment, place
from hpcasync.store.words import encode, numbers, pair, whole
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
# The other ranks push with no pause until rank 0 has read 25 times, and several values: never two values inside a shard.
store, worker, grads, hypers, out = counting([40000, 3, 20000], 30000)
pushes = 0
if me == 0:
    distinct, reads = set(), 0
    while reads < 25 or len(distinct) < 4:
        store.pull(worker, out)
        seen = values(store, out)
        assert all(len(v) == 1 for v in seen), [sorted(v)[:4] for v in seen]
        distinct |= {min(v) for v in seen}
        reads += 1
    store.set_clock(0, 40)
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
    turns = turns_of(P)[: 4 * P]
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


LIBRARY = """
# Progress left to the library: here a barrier, in which every rank is in MPI, serves.
store, worker, grads, hypers, out = counting([40, 50], 16, progress="library")
for i in range(3):
    store.push_pull(worker, grads, out, hypers)
store.barrier()
store.pull(worker, out)
assert values(store, out) == [{3.0 * P}] * len(store.layout.shards)
store.barrier()
store.close()
"""


LIMIT = """
# Every counter passes 2^31 and goes on: requests, versions, clocks.
store, worker, grads, hypers, out = counting([40, 3, 50], 16)
near, shards = 2**31 - 4, len(store.layout.shards)
store._slots.numbers = [near] * shards
store.install(np.zeros((1, store.layout.total), np.float32), [near] * shards)
store.set_clock(me, near)
store.pull(worker, out)
store.barrier()
for i in range(8):
    store.push_pull(worker, grads, out, hypers)
    store.gate(worker, 2)
    assert store.clocks[me] - store.clocks.min() <= 2, store.clocks
    if i % 3 == 0:
        store.pull(worker, out)
store.barrier()
store.pull(worker, out)
assert values(store, out) == [{8.0 * P}] * shards
assert store.shard_versions() == [near + 8 * P] * shards
assert all(store._slots.numbers[k] >= near + 8 > 2**31 for k in store._slots.port_of), store._slots.numbers
store.look()
assert store.clocks.tolist() == [near + 8] * P
store.barrier()
store.set_clock(me, ha.store.IDLE)
store.barrier()
store.look()
assert (store.clocks == ha.store.IDLE).all()
store.barrier()
store.close()
"""


def run(mpirun: MpiRun, n: int, nodes: int, body: str, timeout: float = 250, **options: object) -> None:
    head = HEAD.replace("NODES", str(nodes))
    done = mpirun(head + body + "\nprint('done', flush=True)\n", n, timeout=timeout, **options)  # type: ignore[arg-type]
    assert done.stdout.count("done") == n


def test_two_hosts(two_hosts: HostsRun) -> None:
    run(two_hosts, 4, 2, COUNTS + READER + LIMIT)


def test_a_bound_where_the_first_rank_of_a_node_holds_no_shard(two_hosts: HostsRun) -> None:
    """The first push of all is here; Open MPI then asked a rank that slept, out of MPI (5 of 5 runs hung)."""
    run(two_hosts, 4, 2, BOUND)


@pytest.mark.slow
def test_two_hosts_taking_turns(two_hosts: HostsRun) -> None:
    run(two_hosts, 4, 2, TURNS)


def test_four_hosts(four_hosts: HostsRun) -> None:
    run(four_hosts, 8, 4, COUNTS)


# Only MPICH can tell the ranks of one machine that they are on different nodes.
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_every_rank_a_node(mpirun: MpiRun) -> None:
    run(mpirun, 4, 4, COUNTS + READER + BOUND + LIBRARY + LIMIT, env={"MPIR_CVAR_NOLOCAL": "1"})


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_every_rank_a_node_taking_turns(mpirun: MpiRun) -> None:
    run(mpirun, 3, 3, TURNS, env={"MPIR_CVAR_NOLOCAL": "1"})


def test_a_request_shows_that_it_is_half_written() -> None:
    for number in (0, 1, 77, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40):
        assert whole(encode(number)) and encode(number) != encode(number + 1)
        assert -(1 << 63) <= encode(number) < 1 << 63
    old, new = (np.array([encode(n)]).tobytes() for n in (0x01020304, 0x05060708))
    for cut in range(1, 8):
        for torn in (old[:cut] + new[cut:], new[:cut] + old[cut:]):
            assert not whole(np.frombuffer(torn, np.int64)[0])


def test_a_clock_shows_that_it_is_half_written() -> None:
    for number in (0, 1, 77, (1 << 31) - 1, 1 << 31, 1 << 62, IDLE):
        assert numbers(pair(number)).tolist() == [number]
    both = numbers(np.concatenate([pair(3), pair(IDLE)]))
    assert both.tolist() == [3, IDLE]
    for before, after in ((0x0102030405060708, 0x1112131415161718), (0xFF, 0x100), ((1 << 32) - 1, 1 << 32)):
        old, new = pair(before).tobytes(), pair(after).tobytes()
        for cut in range(1, 16):  # written up to here, in either order; or both words read in the midst of being written
            for torn in (old[:cut] + new[cut:], new[:cut] + old[cut:], *(_mixed(a, b, cut) for a, b in ((old, new), (new, old)))):
                assert numbers(np.frombuffer(torn, np.int64))[0] in (-1, before, after)


def _mixed(first: bytes, last: bytes, cut: int) -> bytes:
    """Each word of two copies of which as many bytes have been copied."""
    return first[: cut // 2] + last[cut // 2 : 8] + first[8 : 8 + cut // 2] + last[8 + cut // 2 :]


def test_every_node_has_shards_where_there_are_enough() -> None:
    layout = make_layout([100, 1000, 3], 64)
    nodes = [0, 0, 1, 2, 2, 2]
    ports = place(layout, list(enumerate(nodes)), nodes)
    assert {p.node for p in ports} == {0, 1, 2}
    assert [p.shards[0] for p in ports] + [len(layout.shards)] == [0] + [p.shards[1] for p in ports]
    assert [p.start for p in ports] + [layout.total] == [0] + [p.stop for p in ports]
    assert all(p.senders == tuple(w for w, node in enumerate(nodes) if node != p.node) for p in ports)
    for port in ports:
        own = port.layout(layout)
        assert own.total == port.stop - port.start and len(own.shards) == port.shards[1] - port.shards[0]
        assert own.shards[0].start == 0 and own.shards[-1].stop == own.total
    sizes = [1000, 24]
    assert len(make_layout(sizes, shard_size(sizes, 8)).shards) == 8
    few = place(make_layout([16]), list(enumerate(nodes)), nodes)
    assert len(few) == 1


def test_segments_do_not_overlap() -> None:
    segment = Segment((16, 48, 32), senders=3, params=5, rows=4, private=1, workers=7)
    names = list(segment.offsets)
    assert all(offset % 64 == 0 for offset in segment.offsets.values())
    blocks = [segment.block(s, k) for s in range(3) for k in range(3)]
    assert np.diff(blocks).tolist() == [4 * n + 64 for n in (16, 48, 32)] * 2 + [4 * 16 + 64, 4 * 48 + 64]
    assert blocks[-1] + 4 * 32 + 64 == segment.offsets["outs"]
    assert segment.out(2, 96) == segment.offsets["privates"] and names[-1] == "end"
    assert segment.offsets["end"] - segment.offsets["state"] == 4 * 4 * 96
