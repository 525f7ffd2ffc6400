"""The store in one process: equal to the sequential reference, exact staleness, the gate, threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hpcasync.rules import ASGD
from hpcasync.store import IDLE, LocalStore, aligned_zeros, make_layout
from tests.store.helpers import gradient, rule, sequential, small_layout, start


def counting_store(sizes: list[int], shard: int, workers: int, threads: int = 1) -> LocalStore:
    """lr 1 and gradients of -1: every push adds exactly 1."""
    store = LocalStore(make_layout(sizes, shard), ASGD(lr=1.0), workers=workers, threads=threads)
    store.start_state(np.zeros(store.layout.total, np.float32))
    return store


def minus_one(store: LocalStore) -> list[np.ndarray]:
    return [np.full(size, -1, np.float32) for size in store.layout.sizes]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("workers, shard", [(1, 10**6), (1, 16), (2, 128), (3, 64), (5, 300)])
def test_round_robin_equals_the_sequential_reference(workers: int, shard: int, threads: int) -> None:
    layout, the_rule = small_layout(shard), rule()
    store = LocalStore(layout, the_rule, workers=workers, threads=threads)
    store.start_state(start())
    views = [store.worker(i) for i in range(workers)]
    outs = [start() for _ in range(workers)]
    hypers = [the_rule.hyper(the_rule.group_options())] * len(layout.sizes)
    turns = [(step, worker) for step in range(4) for worker in range(workers)]
    for step, worker in turns:
        store.push_pull(views[worker], gradient(step, worker, outs[worker]), outs[worker], hypers)
    taus = {(s, w): (w if s == 0 else workers - 1) for s, w in turns}
    expected = sequential(turns, workers, taus)
    np.testing.assert_array_equal(np.array(outs).view(np.int32), expected.view(np.int32))
    assert store.versions.tolist() == [len(turns)] * len(layout.shards)
    assert store.writers.tolist() == [workers - 1] * len(layout.shards)
    assert store.clocks.tolist() == [4] * workers
    for view in views:
        expected_counts = np.bincount([taus[t] for t in turns if t[1] == view.index]) * len(layout.shards)
        assert view.staleness.counts[: expected_counts.size].tolist() == expected_counts.tolist()
        assert view.staleness.counts.sum() == expected_counts.sum()
    store.close()
    store.close()


def test_staleness_of_a_scripted_arrival_order() -> None:
    """tau is the number of others' updates between a worker's read and its write, per shard."""
    store = counting_store([16, 16], 16, 3)
    views = [store.worker(i) for i in range(3)]
    seen: list[tuple[int, int, int, int]] = []
    for view in views:
        view.observer = lambda k, read, wrote, i=view.index: seen.append((i, k, read, wrote))
    grads, out = minus_one(store), np.zeros(32, np.float32)
    hypers = [store.rule.hyper(store.rule.group_options())] * 2

    def push(worker: int, only: int | None = None) -> None:
        g = [x if only in (None, i) else None for i, x in enumerate(grads)]
        store.push_pull(views[worker], g, out, hypers)

    for worker in (0, 1, 2, 0, 0, 2):
        push(worker)
    assert [wrote - 1 - read for i, k, read, wrote in seen if k == 0] == [0, 1, 2, 2, 0, 2]
    seen.clear()
    push(1, only=0)  # parameter 1 lies in shard 1: there worker 1 only reads (it had last read version 2)
    assert seen == [(1, 0, 2, 7)]
    assert store.versions.tolist() == [7, 6] and views[1].read.tolist() == [7, 6]
    seen.clear()
    store.pull(views[0], out)
    push(0)
    assert [(k, read, wrote) for _, k, read, wrote in seen] == [(0, 7, 8), (1, 6, 7)]
    assert store.writers.tolist() == [0, 0]
    np.testing.assert_array_equal(out, [8] * 16 + [7] * 16)
    assert views[1].staleness.counts.nonzero()[0].tolist() == [1, 4]
    assert views[1].staleness.counts[[1, 4]].tolist() == [2, 1]


def test_parameter_without_gradient_in_a_shared_shard_is_only_read() -> None:
    store = counting_store([5, 5, 5], 10**6, 2)
    a, b = store.worker(0), store.worker(1)
    grads, hypers = minus_one(store), [store.rule.hyper(store.rule.group_options())] * 3
    out_a, out_b = np.zeros(48, np.float32), np.zeros(48, np.float32)
    store.push_pull(a, grads, out_a, hypers)
    store.push_pull(b, [grads[0], None, grads[2]], out_b, hypers)
    assert [out_b[i] for i in (0, 16, 32)] == [2, 1, 2]
    store.push_pull(a, [None, None, None], out_a, hypers)
    assert [out_a[i] for i in (0, 16, 32)] == [2, 1, 2]
    assert (
        store.versions.tolist() == [2] and store.writers.tolist() == [1] and store.clocks.tolist() == [2, 1]
    )
    assert a.staleness.counts.sum() == 1


def test_hypers_are_per_parameter() -> None:
    store = counting_store([5, 5], 10**6, 1)
    options, out = store.rule.group_options(), np.zeros(32, np.float32)
    hypers = [store.rule.hyper(options | {"lr": lr}) for lr in (0.5, 4.0)]
    store.push_pull(store.worker(0), minus_one(store), out, hypers)
    assert (out[0], out[16]) == (0.5, 4)


def test_workers_start_at_different_shards() -> None:
    store = counting_store([160], 16, 5)
    assert [store.worker(i).first for i in range(5)] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shard", [16, 10**6])
def test_threads_of_one_process_lose_no_update(shard: int, threads: int) -> None:
    """4 worker threads x 200 pushes of +1; a reader never sees two values inside a shard."""
    store = counting_store([3, 100, 30], shard, 5, threads)
    grads, pushes, workers = minus_one(store), 200, 4
    hypers = [store.rule.hyper(store.rule.group_options())] * 3
    torn: list[str] = []
    stop = threading.Event()

    def push(index: int) -> None:
        worker, out = store.worker(index), np.zeros(store.layout.total, np.float32)
        for _ in range(pushes):
            store.push_pull(worker, grads, out, hypers)

    def read() -> None:
        worker, out = store.worker(4), np.zeros(store.layout.total, np.float32)
        while not stop.is_set():
            store.pull(worker, out)
            for shard_ in store.layout.shards:
                values = {float(v) for p in shard_.pieces for v in out[p.start : p.start + p.size]}
                if len(values) != 1:
                    torn.append(str(values))

    pushers = [threading.Thread(target=push, args=(i,)) for i in range(workers)]
    reader = threading.Thread(target=read)
    for thread in [reader, *pushers]:
        thread.start()
    for thread in pushers:
        thread.join(60)
    stop.set()
    reader.join(60)
    final = np.zeros(store.layout.total, np.float32)
    store.pull(store.worker(0), final)
    for begin, size in zip(store.layout.starts, store.layout.sizes):
        assert (final[begin : begin + size] == workers * pushes).all()
    assert store.versions.tolist() == [workers * pushes] * len(store.layout.shards)
    assert not torn
    store.close()


def test_a_failing_push_gives_its_lock_back() -> None:
    store = counting_store([5], 16, 1)
    hypers = [store.rule.hyper(store.rule.group_options())]
    worker, out = store.worker(0), np.zeros(16, np.float32)

    def fail(*_: int) -> None:
        raise RuntimeError("observer")

    worker.observer = fail
    with pytest.raises(RuntimeError, match="observer"):
        store.push_pull(worker, minus_one(store), out, hypers)
    worker.observer = None
    store.push_pull(worker, minus_one(store), out, hypers)
    assert out[0] == 2


def test_waiting_for_a_lock_is_accounted() -> None:
    store = counting_store([5], 16, 2)
    worker, out = store.worker(0), np.zeros(16, np.float32)
    assert store.try_lock(0, 1)
    assert not store.try_lock(0, 0)
    threading.Timer(0.1, lambda: store.unlock(0, 1)).start()
    store.pull(worker, out)
    assert 0.08 < worker.waited < 5


def test_gate() -> None:
    store = counting_store([5], 16, 3)
    worker = store.worker(0)
    store.clocks[:] = (4, 2, 3)
    assert not store.gate(worker, 2)
    calls: list[list[int]] = []

    def stalled(seconds: float, slow: list[int]) -> None:
        assert seconds > 0
        calls.append(slow)
        store.clocks[slow[0]] += 1

    assert store.gate(worker, 0, stalled, every=0.01)  # 2 -> 4 and 3 -> 4: three calls
    assert [c for c in calls] == [[1, 2], [1, 2], [2]]
    assert store.clocks.tolist() == [4, 4, 4] and worker.waited > 0
    store.clocks[:] = (4, 0, IDLE)
    threading.Timer(0.05, lambda: store.clocks.__setitem__(1, IDLE)).start()
    began = time.perf_counter()
    assert store.gate(worker, 1) and time.perf_counter() - began < 5
    store.clocks[:] = (IDLE, 0, 0)
    assert not store.gate(worker, 0)


def test_start_state_sets_the_vectors_to_their_start() -> None:
    from hpcasync.rules import TrendSmooth

    store = LocalStore(make_layout([5], 16), TrendSmooth(variant="rate"), workers=1)
    store.versions[:], store.writers[:] = 7, 0
    store.start_state(np.arange(16, dtype=np.float32))
    assert [v.name for v in store.rule.vectors] == ["trend", "rate"]
    assert store.state[0].tolist() == list(range(16))
    assert (store.state[1] == 0).all() and (store.state[2] == 1).all()
    assert store.versions.tolist() == [0] and store.writers.tolist() == [-1]


def test_aligned_zeros() -> None:
    for rows, columns in ((1, 1), (3, 17), (2, 64)):
        array = aligned_zeros(rows, columns, np.float64)
        assert array.shape == (rows, columns) and array.dtype == np.float64 and not array.any()
        assert array.ctypes.data % 64 == 0
