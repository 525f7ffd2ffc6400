"""Artificial delay: gradients of old versions, against a loop by hand; its staleness; where it does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync import rules
from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from tests.simulate.test_modes import batches, flat_start, gradient, stores
from tests.simulate.toys import bits, run


@pytest.mark.parametrize("rule", ["asgd", "apam", "dc-asgd"])
def test_one_worker_equals_a_loop_over_old_versions(data: Dataset, rule: str) -> None:
    """The versions that the loop takes are those that the staleness histogram counts."""
    most, lr = 5, 0.05
    found = run(data, workers=1, epochs=1, rule=rule, lr=lr, delay=most)
    made = rules.make_rule(rule, {"lr": lr})
    (store,) = stores(1, made, 1)
    view = store.worker(0)
    hypers = [made.hyper(made.group_options())] * len(store.layout.sizes)
    draws = np.random.default_rng([0, 11])
    versions, counts = [flat_start()], np.zeros(most + 1, int)
    for batch in batches(data, 1)[0]:
        back = int(draws.integers(min(len(versions), most + 1)))
        counts[back] += 1
        copy = versions[-1 - back].copy()
        view.read[:] = len(versions) - 1 - back
        store.push_pull(view, gradient(copy, batch), copy, hypers)
        versions.append(store.state[0].copy())
    np.testing.assert_array_equal(bits(found.parameters), bits(versions[-1]))
    shards = len(store.layout.shards)
    assert found.ranks[0]["staleness"][: most + 1].tolist() == (shards * counts).tolist()
    assert counts[1:].min() > 0  # every age came up


def test_delay_adds_to_the_staleness_of_workers(data: Dataset) -> None:
    plain, delayed = (run(data, workers=3, delay=delay).result["staleness"] for delay in (0, 8))
    assert plain["mean"] < 2 < 4 < delayed["mean"] < 6 + 1 and delayed["max"] == 2 + 8


def test_delay_where_it_does_not_fit(data: Dataset) -> None:
    with pytest.raises(UsageError, match="--delay: rule 'easgd'"):
        run(data, workers=2, rule="easgd", delay=1)
    with pytest.raises(UsageError, match="--delay=-1: expected a whole number >= 0"):
        run(data, delay=-1)
    with pytest.raises(UsageError, match="--delay belongs to mode async"):
        run(data, mode="sync", rule="plain", delay=1)
