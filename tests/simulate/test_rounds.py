"""Rounds in the simulator: clocks count pushes, ``excused`` is a flag."""

from __future__ import annotations

import warnings

import numpy as np

from hpcasync.data import Dataset
from hpcasync.simulate.asynchronous import Asynchronous
from hpcasync.store import IDLE
from tests.simulate.toys import simulation


def rounds(data: Dataset, **keys: object) -> Asynchronous:
    sim = simulation(data, rule="gsgm", workers=4, **keys)
    assert isinstance(sim, Asynchronous)
    return sim


def test_an_excused_worker_is_waited_for_again_after_the_meeting(data: Dataset) -> None:
    sim = rounds(data, slow=("2:20",), patience=3.0)
    store = sim.stores[0]
    met: list[tuple[list[int], list[int]]] = []
    resume, end = sim._resume, sim._end_epoch
    before: list[int] = []

    def watched(workers: list) -> None:  # type: ignore[type-arg]
        resume(workers)
        met.append((store.excused.tolist(), store.clocks.tolist()))

    def ended(alive: list) -> bool:  # type: ignore[type-arg]
        store.excused[2] = 1  # as when it had not come back before the end
        before.append(int(store.excused.sum()))
        return end(alive)

    sim._resume, sim._end_epoch = watched, ended  # type: ignore[method-assign]
    sim.run()
    steps = sim.steps_per_epoch
    assert before == [1, 1]
    assert met == [([0] * 4, [0] * 4), ([0] * 4, [steps] * 4)]
    assert [w.updates for w in sim.workers] == [2 * steps] * 4


def test_a_skipped_push_is_one_turn(data: Dataset) -> None:
    """The clock of a worker that was excused goes on by one, as that of any other."""
    sim = rounds(data, slow=("2:20",), patience=3.0, lr=1e30)
    store = sim.stores[0]
    counts: list[int] = []
    push = sim._push

    def watched(worker) -> None:  # type: ignore[no-untyped-def]
        before = int(store.clocks[worker.view.index])
        push(worker)
        after = int(store.clocks[worker.view.index])
        if after != IDLE:
            counts.append(after - before)

    sim._push = watched  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim.run()
    assert sum(w.skipped for w in sim.workers) > 10
    assert set(counts) == {1}
    assert np.array([w.steps for w in sim.workers]).tolist() == [2 * sim.steps_per_epoch] * 4
