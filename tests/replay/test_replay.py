"""A replay in one process ends in the very bits of the live run: every rule, 2 to 4 ranks, killed and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcasync.cli import main
from hpcasync.modes.recorder import Event
from hpcasync.replay.replay import Replay
from hpcasync.rules import RULES
from hpcasync.train.record_file import read_record
from tests.hosts import HostsRun
from tests.mpi import MpiRun
from tests.replay.helpers import FROZEN, NORM, changed, column, launch, record, replay

LOCKED = [name for name, rule in RULES.items() if not rule.lock_free]
VARIANTS: dict[str, tuple[str, ...]] = {
    "momentum": ("--rule", "plain", "--base", "momentum", "--schedule", "cosine", *NORM),
    "shrink": ("--rule", "trend-smooth", "--variant", "opposed", "--shrink", "staleness", *FROZEN),
    "adaptive": ("--rule", "dc-asgd", "--adaptive", *FROZEN),
    "period": ("--rule", "eamsgd", "--period", "3", *NORM),
    "bound": ("--rule", "asgd", "--staleness", "0", *FROZEN),
    "discard": ("--rule", "gsgm", "--out-of-turn", "discard", *NORM),
    "round": ("--rule", "gsgm", "--average", "round", *FROZEN),
    "groups": ("--rule", "gsgm", "--average", "groups", *NORM),
    "ring": ("--rule", "gsgm", "--window", "2", *NORM),
    "guided": ("--guided", "--rho", "4", "--rule", "asgd", "--base", "adam", *NORM),
    "infinite": ("--rule", "asgd", "--lr", "1e18", *FROZEN),
    "dirichlet": ("--rule", "asgd", "--partition", "dirichlet:0.5", *NORM),
}
only_mpich = pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the record is above MPI


def batch(ranks: int) -> tuple[str, str]:
    return "--batch", str(1440 // (30 * ranks))


def check_all(folder: Path, names: Any, ranks: int) -> None:
    for name in names:
        run = Replay(folder / name)
        assert len(run.records) == ranks and run.records[0].facts["shards"] > 2
        outcome = run.run()
        assert outcome.identical and outcome.complete, (name, outcome)
        assert outcome.events == outcome.recorded
        assert outcome.parameters_sha256 == run.records[0].end["parameters_sha256"]
        live = column(folder / name, 0, "final/" + next(iter(run.records[0].final)))
        assert live.tobytes() == dict(run.model.state_dict())[next(iter(run.records[0].final))].numpy().tobytes()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rule(mpirun: MpiRun, ranks: int) -> None:
    if mpirun.lane.name != "mpich" and ranks != 2:
        pytest.skip("the record is above MPI: the other library is tried at 2 ranks")
    runs = {name: ("--rule", name, *NORM, *batch(ranks)) for name in LOCKED}
    check_all(record(mpirun, runs, ranks), runs, ranks)


@only_mpich
def test_every_option_that_changes_the_order(mpirun: MpiRun) -> None:
    runs = {name: (*flags, *batch(3)) for name, flags in VARIANTS.items()}
    folder = record(mpirun, runs, 3)
    check_all(folder, runs, 3)
    kinds = {name: {int(k) for r in range(3) for k in column(folder / name, r, "events")["kind"]} for name in runs}
    assert Event.DISCARD in kinds["discard"] and Event.SKIP in kinds["infinite"] and Event.GATE in kinds["bound"]
    guided = column(folder / "guided", 0, "events")
    pushes = guided[guided["kind"] == Event.PUSH]
    assert (pushes["batch"] != pushes["step"]).any()
    assert (column(folder / "shrink", 0, "events")["versions"] < 0).any()  # shards that were only read
    assert len(column(folder / "momentum", 0, "hypers")) > 20


@only_mpich
def test_one_rank_with_several_threads(mpirun: MpiRun) -> None:
    runs = {"one": ("--rule", "dc-asgd", "--threads", "2", *NORM, *batch(1)), "own": ("--rule", "easgd", *NORM, *batch(1))}
    folder = record(mpirun, runs, 1)
    for name in runs:
        outcome = Replay(folder / name).run()
        assert outcome.identical and outcome.complete, (name, outcome)


@only_mpich
def test_a_changed_record_is_not_identical(mpirun: MpiRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = record(mpirun, {"run": ("--rule", "trend-smooth", *NORM, *batch(2))}, 2) / "run"
    code, found = replay(capsys, run)
    assert code == 0 and found["identical"] and found["complete"] and found["first_difference"] is None
    assert found["parameters_sha256"] == found["recorded_sha256"]
    samples, first = column(run, 1, "samples"), int(column(run, 1, "steps")["first"][7])
    other = changed(run, "samples", 1, "samples", first, None, (samples[first] + 1) % 1000)
    code, found = replay(capsys, other)
    assert code == 1 and not found["identical"]
    assert found["first_difference"]["what"] == "loss"
    assert (found["first_difference"]["rank"], found["first_difference"]["step"]) == (1, 8)
    lr = column(run, 0, "hypers")[0, 0, 0]
    code, found = replay(capsys, changed(run, "lr", 0, "hypers", 0, None, np.full(18, np.nextafter(lr, 1))))
    assert code == 1 and not found["identical"]
    events = column(run, 0, "events")
    last = np.flatnonzero(events["kind"] == Event.SYNC)[-1]
    code, found = replay(capsys, changed(run, "digest", 0, "events", last, "digest", 1))
    assert code == 1 and found["first_difference"]["what"] == "parameters"
    name = "0.weight"
    code, found = replay(capsys, changed(run, "final", 0, f"final/{name}", 0, None, 0.0))
    assert code == 1 and name in found["first_difference"]["what"]


@only_mpich
def test_until_inspect_and_compare(mpirun: MpiRun, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"run": (*FROZEN, *batch(3)), "other": (*FROZEN, *batch(3)), "bound": ("--staleness", "3", *FROZEN, *batch(3))}
    folder = record(mpirun, runs, 3)
    run = folder / "run"
    code, found = replay(capsys, run, "--until", 5)
    assert code == 0 and found["identical"] and not found["complete"]
    assert min(found["steps"]) >= 5 and found["events"] < found["recorded"] and found["recorded_sha256"] is None
    code, found = replay(capsys, run, "--inspect", "2:9")
    seen = found["inspect"]
    records = read_record(run)
    at = np.flatnonzero((records[2].events["step"] == 9) & (records[2].events["kind"] == Event.PUSH))[0]
    assert code == 0 and seen["loss"] == records[2].steps["loss"][8] == seen["updates"][0]["loss"]
    assert seen["updates"][0]["gradient_norm"] > 0 and seen["updates"][0]["what"] == "pushed"
    for k, shard in enumerate(seen["updates"][0]["shards"]):
        assert shard["read"] == records[2].before[at, k] and shard["now"] == records[2].versions[at, k]
        assert shard["staleness"] == len(shard["between"]) == shard["now"] - shard["written"] - shard["read"]
        assert set(shard["between"]) <= {0, 1}
    assert {s["written"] for s in seen["updates"][0]["shards"]} == {True, False}
    code, found = replay(capsys, run, "--compare", run)
    assert code == 0 and found["identical"] and found["first"] is None
    code, found = replay(capsys, run, "--compare", folder / "bound")
    assert code == 1 and found["settings"] == {"staleness": [None, 3]} and found["first"]["step"] >= 1
    first = int(column(run, 1, "steps")["first"][4])
    code, found = replay(capsys, run, "--compare", changed(run, "changed", 1, "samples", first, None, 1))
    assert code == 1 and found["first"] == {"what": "samples", "rank": 1, "step": 5}
    assert [d["what"] for d in found["differences"]] == ["samples"]
    # The simulator takes a recorded run as any other.
    assert main(["simulate", "--like", str(run), "--epochs", "1", "--output", str(folder / "simulated"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ranks"] == 3


@only_mpich
def test_a_killed_run_is_replayed_as_far_as_it_is_known(mpirun: MpiRun, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rule", "dc-asgd", "--staleness", "3", *NORM, *batch(3))  # so that the others have made steps by then, too
    folder = record(mpirun, {"run": words}, 3, env={"DIES": "1"}, check=False)
    run = folder / "run"
    assert len(column(run, 1, "steps")) > 20  # nothing of what the killed rank wrote is lost
    records = read_record(run)
    assert len(records[1].steps) == 21 and not any(r.closed or r.final for r in records)
    assert (records[1].events["kind"] == Event.PUSH).sum() == 20
    code, found = replay(capsys, run)
    assert code == 0 and found["identical"] and not found["complete"] and found["recorded_sha256"] is None
    # A rank killed between its update and its row hides what the others did after it.
    assert found["events"] > 20 and found["updates"] > 20
    assert main(["timeline", str(run)]) == 0


@only_mpich
def test_a_resumed_run_is_replayed_whole(mpirun: MpiRun, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {name: ("--rule", name, "--checkpoint-every", "11", *NORM, *batch(2)) for name in ("gsgm", "easgd")}
    folder = record(mpirun, runs | {"plain": ("--no-record",)}, 2)
    # From the middle of the epoch.
    on = {name: (*flags, "--epochs", "2", "--resume", f"{name}/checkpoint-000002.h5") for name, flags in runs.items()}
    record(mpirun, on, 2)
    for name in runs:
        code, found = replay(capsys, folder / name)
        assert code == 0 and found["identical"] and found["complete"], found
        assert found["steps"] == [60, 60]
        assert (column(folder / name, 1, "events")["kind"] == Event.RESUME).sum() == 1
    done = launch(mpirun, {"plain": ("--epochs", "2", "--resume", "auto")}, 2, check=False)
    assert "error: --record: plain/checkpoint-000001.h5" in done.stderr and "whole from the first step" in done.stderr


@only_mpich
def test_several_nodes(two_hosts: HostsRun) -> None:
    rules = ("dc-asgd", "gsgm", "easgd")  # what they keep per worker lies elsewhere than on one node
    runs = {name: ("--rule", name, "--progress", "thread", *NORM, *batch(4)) for name in rules}
    folder = record(two_hosts, runs, 4)
    for name in runs:
        run = Replay(folder / name)
        outcome = run.run()
        assert outcome.identical and outcome.complete, (name, outcome)
        assert {r.facts["node"] for r in run.records} == {0, 1} and run.records[0].facts["shards"] > 1
        assert main(["timeline", str(folder / name)]) == 0
