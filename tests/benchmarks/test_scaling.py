"""The scripts of ``benchmarks/scaling`` run in their quick form; no time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mpi import MpiRun

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "scaling"


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_side_by_side(mpirun: MpiRun, tmp_path: Path) -> None:
    mpirun(FOLDER / "side_by_side.py", None, args=["--quick", "--json", tmp_path / "x.json"], timeout=300)
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    sides = {"Async", "Sync", "KStep", "DDP", "PostLocalSGD", "server", "server, exchange", "Async, exchange"}
    assert sides <= row["seconds"].keys()
    assert all(speed > 0 for speed in row["samples_per_second"].values())


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_scaling_and_stragglers(mpirun: MpiRun, tmp_path: Path) -> None:
    words = ["--quick", "--out", tmp_path / "a", "--", "--model", "logistic", "--what", "sync", "async:asgd"]
    done = mpirun(FOLDER / "local.py", None, args=words, timeout=300)
    assert "| weak | torch | 1 |" in done.stdout and "| strong | async:asgd | 2 |" in done.stdout
    words = ["--quick", "--stragglers", "--json", tmp_path / "x.json", "--", "--what", "sync", "async:asgd"]
    mpirun(FOLDER / "local.py", None, args=words, timeout=300)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["ranks"], row["what"]) for row in rows] == [(2, "async:asgd"), (2, "sync")]
    assert all(0 < row["kept"] <= 1.01 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_projection(mpirun: MpiRun, tmp_path: Path) -> None:
    args = ["--quick", "--nodes", "1", "16", "--json", tmp_path / "x.json", "--out", tmp_path / "table.md"]
    done = mpirun(FOLDER / "projection.py", None, args=args, timeout=300)
    assert "PROJECTION" in done.stdout and (tmp_path / "table.md").read_text().count("| 16 |") == 2
    for row in json.loads((tmp_path / "x.json").read_text())["rows"]:
        one, many = row["projection"]
        assert one["sync_efficiency"] == pytest.approx(1, abs=0.1)
        assert many["async"] > one["async"] and 0 < many["async_efficiency"] <= 1.1
