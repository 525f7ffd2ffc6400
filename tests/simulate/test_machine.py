"""The virtual machine: distributions, network, service, failures, joiners, and what a recorded run tells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.simulate.cluster import Network, parse_changes, parse_network
from hpcasync.simulate.distributions import parse_distribution
from hpcasync.simulate.units import bytes_per_second, seconds
from tests.simulate.toys import run


@pytest.mark.parametrize(
    "text, mean, deviation",
    [
        ("constant:20ms", 0.02, 0.0),
        ("exponential:2.0", 2.0, 2.0),
        ("lognormal:1.0,0.3", 1.0, math.sqrt(math.exp(0.09) - 1)),
        ("gamma:500us,4", 5e-4, 2.5e-4),
    ],
)
def test_distributions_have_their_moments(text: str, mean: float, deviation: float) -> None:
    drawn = parse_distribution(text).sample(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert drawn.std() == pytest.approx(deviation, rel=0.03, abs=1e-9)
    assert drawn.min() > 0


def test_recorded_times_are_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "steps.txt").write_text("0.5, 1.5\n2.5")
    found = parse_distribution(f"recorded:{tmp_path / 'steps.txt'}")
    assert found.mean == 1.5
    assert set(found.sample(np.random.default_rng(0), 100)) == {0.5, 1.5, 2.5}


def test_units() -> None:
    assert [seconds(t, "") for t in ("2", "2s", "2ms", "2us", "2µs", "1e-3")] == [2, 2, 2e-3, 2e-6, 2e-6, 1e-3]
    assert [bytes_per_second(t, "") for t in ("10GB/s", "8Gbit/s", "5MB", "inf")] == [1e10, 1e9, 5e6, math.inf]
    assert parse_network("5us,10GB/s") == Network(5e-6, 1e10)
    assert Network(1.0, 10.0).transfer(20) == 3
    assert Network(1.0, 10.0).allreduce(40, 4) == 6 * (1 + 1)


BAD = [
    (lambda: parse_distribution("lognornal:1,2"), ["'lognornal'", "did you mean 'lognormal'", "--compute"]),
    (lambda: parse_distribution("constant"), ["constant:MEAN"]),
    (lambda: parse_distribution("lognormal:1.0"), ["lognormal:MEAN,SIGMA"]),
    (lambda: parse_distribution("exponential:1,2"), ["exponential:MEAN"]),
    (lambda: parse_distribution("exponential:0"), ["'0'", "> 0"]),
    (lambda: parse_distribution("constant:-1"), ["'-1'"]),
    (lambda: parse_distribution("constant:1 h"), ["'1 h'", "ms"]),
    (lambda: parse_distribution("lognormal:1,x"), ["'x'", ">= 0"]),
    (lambda: parse_distribution("gamma:1,0"), ["'0'", "> 0"]),
    (lambda: parse_distribution("recorded:/nowhere.txt"), ["/nowhere.txt", "No such file"]),
    (lambda: parse_distribution("recorded:/nowhere/run.h5"), ["run.h5", "not a finished run"]),
    (lambda: parse_network("5us"), ["LATENCY,BANDWIDTH"]),
    (lambda: parse_network("5us,fast"), ["'fast'", "10GB/s"]),
    (lambda: parse_network("5us,0GB/s"), ["> 0"]),
    (lambda: parse_network("-5us,1GB/s"), ["'-5us'"]),
    (lambda: parse_changes(["1"], [], 4), ["--fail 1", "RANK@SECONDS"]),
    (lambda: parse_changes([], ["7@1"], 4), ["--join 7@1", "no worker 7"]),
    (lambda: parse_changes(["1@soon"], [], 4), ["'soon'"]),
    (lambda: parse_changes(["1@1", "1@2"], [], 4), ["worker 1 fails at 2 s"]),
    (lambda: parse_changes([], ["0@1", "1@1"], 2), ["all 2 workers join late"]),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_does_not_parse_is_one_clear_error(number: int) -> None:
    make, parts = BAD[number]
    with pytest.raises(UsageError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_network_and_service_take_time(data: Dataset) -> None:
    nbytes = 4 * (6 * 9 + 9 + 9 * 7 + 7 + 7 * 3 + 3)
    found = run(data, workers=2, epochs=1, network=f"0.25,{nbytes}B/s")
    assert found.result["virtual_seconds"] == pytest.approx(12 * (1 + 2 * 1.25))
    assert found.ranks[0]["communicate"] == pytest.approx(12 * 2.5)
    total = 4 * sum(-(-n // 16) * 16 for n in (54, 9, 63, 7, 21, 3))
    queued = run(data, workers=4, epochs=1, service=f"{total}B/s", compute="constant:0")
    # One shard: one push per second, however many workers.
    assert queued.result["virtual_seconds"] == pytest.approx(24, abs=4)


def test_slow_workers_push_less_when_running_free(data: Dataset) -> None:
    found = run(data, workers=3, slow=("1:4.0",), free_running=True)
    updates = [r["updates"] for r in found.ranks]
    assert updates[0] == pytest.approx(4 * updates[1], abs=4) and sum(updates) == 48


@pytest.mark.parametrize("mode", ["async", "sync", "kstep", "hierarchical"])
def test_a_worker_dies_and_the_others_go_on(data: Dataset, mode: str) -> None:
    every = {"every": 2} if mode in ("kstep", "hierarchical") else {}
    found = run(data, mode=mode, workers=4, fail=("2@3.5",), **every, rule="asgd" if mode != "sync" else "plain")
    steps = 2 * 96 // 4 // 4
    assert [r["updates"] for r in found.ranks] == [steps, steps, 3, steps]
    assert found.ranks[2]["compute"] == 3 and found.result["virtual_seconds"] == steps
    assert found.result["epochs"] == 2 and np.isfinite(found.parameters).all()


@pytest.mark.parametrize("mode", ["async", "sync", "kstep", "hierarchical"])
def test_a_worker_joins_late_and_one_comes_back(data: Dataset, mode: str) -> None:
    every = {"every": 2} if mode in ("kstep", "hierarchical") else {}
    keys = {"join": ("1@4", "0@8"), "fail": ("0@2",), "workers": 4, "rule": "asgd" if mode != "sync" else "plain"}
    found = run(data, mode=mode, **keys, **every)
    updates = [r["updates"] for r in found.ranks]
    assert updates[2] == updates[3] == 12
    assert 0 < updates[1] < 12 and 0 < updates[0] < 12
    assert np.isfinite(found.parameters).all()


def test_a_dead_worker_holds_nobody_up_at_the_gate(data: Dataset) -> None:
    found = run(data, workers=3, fail=("0@2.5",), staleness=0)
    assert [r["updates"] for r in found.ranks] == [2, 16, 16]


@pytest.mark.parametrize("mode", ["async", "sync", "kstep"])
def test_nobody_left_is_an_error_that_says_when(data: Dataset, mode: str) -> None:
    with pytest.raises(UsageError, match=r"--fail: no worker is left at 3"):
        run(data, mode=mode, workers=2, fail=("0@2", "1@3"), rule="asgd" if mode == "async" else "plain")
