"""Every rule in the simulator; rounds, own copies and patience."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.rules import RULES
from tests.simulate.toys import bits, mlp, run, simulation

KEYS: dict[str, dict[str, Any]] = {"easgd": {"period": 2}, "eamsgd": {"period": 3}}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_runs_and_repeats(data: Dataset, rule: str) -> None:
    keys = {"rule": rule, "workers": 4, "compute": "exponential:1.0", **KEYS.get(rule, {})}
    first, second = (run(data, **keys) for _ in range(2))
    np.testing.assert_array_equal(bits(first.parameters), bits(second.parameters))
    assert np.isfinite(first.parameters).all()
    assert first.result["updates"] == 2 * 24
    assert first.result["train_loss"] < 1.5


def test_gsgm_takes_every_worker_once_per_round(data: Dataset) -> None:
    sim = simulation(data, rule="gsgm", workers=4, slow=("1:3.5",), compute="exponential:1.0", epochs=1)
    order: list[int] = []
    for worker in sim.workers:
        worker.view.observer = lambda k, r, w, i=worker.index: order.append(i)
    sim.run()
    assert len(order) == 24
    for start in range(0, 24, 4):
        assert sorted(order[start : start + 4]) == [0, 1, 2, 3]
    assert sim.workers[0].record(sim.now)["wait"] > 0


def test_gsgm_turns_the_round_without_a_dead_or_a_very_slow_worker(data: Dataset) -> None:
    dead = run(data, rule="gsgm", workers=4, fail=("2@2.5",), epochs=1)
    assert [r["updates"] for r in dead.ranks] == [6, 6, 2, 6]
    slow = simulation(data, rule="gsgm", workers=4, slow=("2:20",), patience=3.0, epochs=1)
    when: list[float] = []
    slow.workers[0].view.observer = lambda k, r, w: when.append(slow.now)
    slow.run()
    # The first push at 1, the second is held from 2 on: 3 s later the round turns without worker 2.
    assert when[:2] == [1, 5]
    assert [w.updates for w in slow.workers] == [6] * 4


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2}, {"average": "round"}, {"average": "groups"}, {"average": "groups", "window": 2}],
    ids=lambda o: "-".join(map(str, o.values())) or "sum",
)
def test_gsgm_averages(data: Dataset, options: dict[str, Any]) -> None:
    """Every way to average trains, repeats its bits, and differs from the others."""
    keys = {"rule": "gsgm", "workers": 4, "compute": "exponential:1.0", "lr": 0.3, "epochs": 10, **options}
    first, second = (run(data, **keys) for _ in range(2))
    np.testing.assert_array_equal(bits(first.parameters), bits(second.parameters))
    assert first.curve[-1]["test_loss"] < first.curve[0]["test_loss"] - 0.05
    other = run(data, **keys | {"average": "round" if options.get("average") == "groups" else "groups", "window": None})
    assert (bits(first.parameters) != bits(other.parameters)).any()


def test_gsgm_may_discard(data: Dataset) -> None:
    found = run(data, rule="gsgm", workers=3, slow=("1:3",), out_of_turn="discard", epochs=1)
    updates = [r["updates"] for r in found.ranks]
    assert updates[1] == 8 and updates[0] < 8
    assert found.ranks[0]["samples"] == 32
    assert found.result["discarded"] == 24 - sum(updates) > 0 and found.result["lock_free"] is False
    assert found.ranks[1]["discarded"] == 0
    assert run(data, rule="hogwild", workers=3, epochs=1).result["lock_free"] is True


def test_easgd_pays_for_messages_only_when_copies_meet(data: Dataset) -> None:
    keys = {"rule": "easgd", "workers": 2, "epochs": 1, "network": "1s,inf"}
    steps = 96 // 2 // 4
    every, fourth = (run(data, period=p, **keys).result["virtual_seconds"] for p in (1, 4))
    assert every == steps * 3
    assert fourth == steps + 1 + 3 * 2  # the first read, then three meetings
    with pytest.raises(UsageError, match="use mode async"):
        simulation(data, mlp(), rule="easgd", mode="kstep")
