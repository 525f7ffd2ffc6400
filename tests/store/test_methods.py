"""Every rule in the stores: workers that take turns equal the sequential reference, bit for bit; rounds; lock-free pushes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcasync.rules import ASGD, EASGD, GSGM, Hogwild, Rule
from hpcasync.store import IDLE, LocalStore, make_layout
from tests.mpi import MpiRun
from tests.store.helpers import gradient, small_layout, start
from tests.store.methods import RULES, fits, replay, turns_of


def named(rule: Rule) -> str:
    return f"{rule.name}-{rule.base}"


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("workers, shard, threads", [(1, 128, 1), (2, 64, 1), (3, 300, 2), (4, 10**6, 1)])
def test_turns_equal_the_sequential_reference(rule: Rule, workers: int, shard: int, threads: int) -> None:
    if not fits(rule, workers):
        with pytest.raises(ValueError, match="at most the number of workers"):
            LocalStore(small_layout(shard), rule, workers=workers)
        return
    store = LocalStore(small_layout(shard), rule, workers=workers, threads=threads)
    store.start_state(start())
    views, outs = [store.worker(i) for i in range(workers)], [start() for _ in range(workers)]
    hypers = [rule.hyper(rule.group_options())] * len(store.layout.sizes)
    turns = turns_of(workers)
    for step, worker in turns:
        assert store.may_push(views[worker])
        store.push_pull(views[worker], gradient(step, worker, outs[worker]), outs[worker], hypers)
        assert store.may_push(views[worker]) == (not rule.in_turn or workers == 1 or len(set(store.clocks)) == 1)
    copies, w = replay(rule, turns, workers)
    np.testing.assert_array_equal(np.array(outs).view(np.int32), copies.view(np.int32))
    np.testing.assert_array_equal(store.state[0].view(np.int32), w.view(np.int32))


def test_the_workers_differ_with_copies_of_their_own() -> None:
    """Guards the test above: no worker of EASGD holds the centre."""
    copies, w = replay(EASGD(lr=0.1, period=4), turns_of(3), 3)
    assert len({c.tobytes() for c in (*copies, w)}) == 4


def make(rule: Rule, workers: int) -> tuple[LocalStore, list[np.ndarray]]:
    store = LocalStore(make_layout([4]), rule, workers=workers)
    store.start_state(np.zeros(store.layout.total, np.float32))
    return store, [store.rule.hyper(store.rule.group_options())]


def test_turns_holds_and_excuses() -> None:
    store, hypers = make(GSGM(base="sgd", lr=1.0), 3)
    a, b, c = (store.worker(i) for i in range(3))
    out, grads = np.zeros(16, np.float32), [np.ones(4, np.float32)]
    store.push_pull(a, grads, out, hypers)
    assert not store.may_push(a) and store.may_push(b) and store.may_push(c)
    store.push_pull(b, grads, out, hypers)
    assert not store.take_turn(a, hold=False, patience=60)
    store.clocks[2] = IDLE  # c has finished: the round turns
    assert store.take_turn(a, hold=False, patience=60) and a.refused is None
    store.clocks[2] = 0  # c is back, and slow
    told: list[list[int]] = []
    assert store.take_turn(a, hold=True, patience=0.1, stalled=lambda s, slow: told.append(slow), every=0.01)
    assert told and told[0] == [2] and a.waited > 0.05
    assert store.excused.tolist() == [0, 0, 1] and store.may_push(b)
    for worker in (a, b, a):
        assert store.take_turn(worker, hold=False, patience=60)
        store.push_pull(worker, grads, out, hypers)
    assert store.clocks.tolist() == [3, 2, 0] and not store.may_push(a)
    assert store.may_push(c) and store.clocks[2] == 2 and store.excused[2] == 0  # it joins the round that the others are in
    store.push_pull(c, grads, out, hypers)
    assert not store.may_push(c) and not store.may_push(a) and store.may_push(b)


def test_the_sum_is_of_those_that_have_pushed() -> None:
    """Worker 1 never comes: worker 0's gradient alone, not half of it; then the mean of both newest."""
    store, hypers = make(GSGM(base="sgd", lr=1.0), 2)
    a, b = store.worker(0), store.worker(1)
    out = np.zeros(16, np.float32)
    for g, expected in ((1, -1), (3, -4)):
        store.push_pull(a, [np.full(4, g, np.float32)], out, hypers)
        assert out[0] == expected
    store.push_pull(b, [np.full(4, 5, np.float32)], out, hypers)
    assert out[0] == -4 - (3 + 5) / 2 and store.state[1, 0] == 8


def test_easgd_of_two_workers_by_hand() -> None:
    """a = 1/2, gradients 0 after the first step: the copies and the centre draw each other."""
    store, hypers = make(EASGD(lr=1.0, period=2, moving_rate=0.5), 2)
    x, y = store.worker(0), store.worker(1)
    at_x, at_y = np.zeros(16, np.float32), np.zeros(16, np.float32)

    def step(worker: int, g: float) -> tuple[float, float, float]:
        store.push_pull((x, y)[worker], [np.full(4, g, np.float32)], (at_x, at_y)[worker], hypers)
        return float(at_x[0]), float(at_y[0]), float(store.state[0, 0])

    assert step(0, -8) == (8, 0, 0)  # an exchange of equals, then the step on the copy alone
    assert step(1, 4) == (8, -4, 0)
    assert step(0, 1) == (7, -4, 0)  # no exchange
    assert step(1, 0) == (7, -4, 0)
    assert step(0, 0) == (3.5, -4, 3.5)  # e = 7/2
    assert step(1, 0) == (3.5, -0.25, -0.25)  # e = -7.5/2
    assert store.versions.tolist() == [4] and store.clocks.tolist() == [3, 3]
    store.pull(x, at_x)
    assert at_x[0] == -0.25


def test_lock_free_takes_no_lock() -> None:
    """The label says so; a store whose locks are all held can still be pushed to."""
    assert Hogwild.lock_free and "loses updates" in Hogwild.paper and not ASGD.lock_free
    store, hypers = make(Hogwild(lr=1.0), 2)
    assert store.try_lock(0, 1)
    out = np.zeros(16, np.float32)
    store.push_pull(store.worker(0), [np.ones(4, np.float32)], out, hypers)
    assert out[0] == -1


def test_lock_free_threads_may_lose_but_stay_sane() -> None:
    store, hypers = make(Hogwild(lr=1.0), 4)

    def push(i: int) -> None:
        worker, out = store.worker(i), np.zeros(16, np.float32)
        for _ in range(100):
            store.push_pull(worker, [np.full(4, -1, np.float32)], out, hypers)

    threads = [threading.Thread(target=push, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert ((store.state[0, :4] >= 100) & (store.state[0, :4] <= 400)).all()


TURNS = """
import numpy as np
import hpcasync as ha
from hpcasync.store import WindowStore
from tests.store.helpers import gradient, small_layout, start
from tests.store.methods import RULES, replay, turns_of

world = ha.init()
P, me = world.size, world.rank
for shard in (128, 10**6):
    for rule in RULES:
        store = WindowStore(world, small_layout(shard), rule)
        if me == 0:
            store.start_state(start())
        store.barrier()
        worker, out = store.worker(me), start()
        hypers = [rule.hyper(rule.group_options())] * len(store.layout.sizes)
        turns = turns_of(P)
        for step, rank in turns:
            if rank == me:
                assert store.may_push(worker)
                store.push_pull(worker, gradient(step, rank, out), out, hypers)
            store.barrier()
        copies, w = replay(rule, turns, P)
        assert np.array_equal(out.view(np.int32), copies[me].view(np.int32)), rule
        assert np.array_equal(store.state[0].view(np.int32), w.view(np.int32)), rule
        store.barrier()
        store.close()
print("done", flush=True)
"""


def test_turns_in_the_window(mpirun: MpiRun) -> None:
    done = mpirun(TURNS, 3, timeout=250)
    assert done.stdout.count("done") == 3
