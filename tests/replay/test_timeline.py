"""The trace: valid in the trace-event format, one track per rank, slices that do not overlap, arrows from writes to reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcasync.cli import main
from hpcasync.train.record_file import read_record
from tests.mpi import MpiRun
from tests.replay.helpers import FROZEN, NORM, record

NEEDED = {"M": {"args"}, "X": {"ts", "dur", "args", "cat"}, "s": {"id", "ts", "cat"}, "f": {"id", "ts", "cat", "bp"}}
SLICES = {"compute", "wait", "apply", "pull", "checkpoint", "evaluation"}


@pytest.fixture
def trace(mpirun: MpiRun) -> tuple[Path, list[dict[str, Any]]]:
    runs = {"run": ("--rule", "gsgm", "--out-of-turn", "discard", *NORM, "--batch", "48"), "sync": ("--mode", "sync", *FROZEN)}
    folder = record(mpirun, runs, 2)
    assert main(["timeline", str(folder / "run"), "-o", str(folder / "trace.json")]) == 0
    return folder, json.loads((folder / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # no MPI in what is tested
def test_trace(trace: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, entries = trace
    for entry in entries:
        assert {"ph", "name", "pid", "tid"} | NEEDED[entry["ph"]] <= entry.keys(), entry
        assert entry["ph"] == "M" or (np.isfinite(entry["ts"]) and entry.get("dur", 0) >= 0)
    tracks = {e["tid"]: e["args"]["name"] for e in entries if e["name"] == "thread_name"}
    assert tracks == {0: "rank 0", 1: "rank 1"}
    slices = [e for e in entries if e["ph"] == "X"]
    assert {e["name"] for e in slices} == SLICES
    for rank in tracks:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == rank)
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(own)]
        assert min(gaps) > -0.01  # microseconds: a track's slices follow each other
    records = read_record(folder / "run")
    computed = sum(e["dur"] for e in slices if e["name"] == "compute" and e["tid"] == 1) / 1e6
    spent = float(np.nansum(records[1].steps["compute"]))
    assert computed == pytest.approx(spent, rel=0.05)
    check_arrows(entries, slices)

    assert main(["timeline", str(folder / "run"), "--steps", "3:5"]) == 0
    part = json.loads((folder / "run/trace.json").read_text())["traceEvents"]
    assert {e["args"]["step"] for e in part if e["ph"] == "X"} == {3, 4, 5}
    for wrong in (("--steps", "0:3"), ("--steps", "100000:100001"), ("-o", "."), ("-o", "/"), ("-o", str(folder))):
        assert main(["timeline", str(folder / "run"), *wrong]) == 2, wrong
    assert main(["timeline", str(folder / "sync")]) == 0
    sync = json.loads((folder / "sync/trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in sync if e["ph"] == "X"} >= {"compute", "communicate", "checkpoint", "evaluation"}
    assert len([e for e in sync if e["name"] == "compute"]) == sum(len(r.steps) for r in read_record(folder / "sync"))


def check_arrows(entries: list[dict[str, Any]], slices: list[dict[str, Any]]) -> None:
    """Every arrow has both ends, goes forward in time to another rank, and binds to slices: a push, and a read that saw it."""
    starts, ends = ({e["id"]: e for e in entries if e["ph"] == ph} for ph in "sf")
    assert starts.keys() == ends.keys() and len(starts) > 5
    for number, start in starts.items():
        end = ends[number]
        assert end["ts"] >= start["ts"] and end["tid"] != start["tid"] and end["bp"] == "e"
        push, read = (around(e, slices) for e in (start, end))
        assert push["name"] in ("wait", "apply") and "staleness" in push["args"]
        saw = np.array(read["args"]["versions now"]) >= np.array(push["args"]["versions now"])
        new = np.array(read["args"]["versions read"]) < np.array(push["args"]["versions now"])
        assert (saw & new).any()


def around(entry: dict[str, Any], slices: list[dict[str, Any]]) -> dict[str, Any]:
    """The slice that an arrow's end binds to."""
    found = [
        e
        for e in slices
        if e["tid"] == entry["tid"] and e["name"] != "compute" and e["ts"] <= entry["ts"] <= e["ts"] + e["dur"]
    ]
    assert len(found) == 1, entry
    return found[0]
