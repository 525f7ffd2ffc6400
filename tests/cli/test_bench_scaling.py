"""``hpcasync bench scaling`` under a real mpiexec."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from tests.cli.cases import run_cases
from tests.mpi import MpiRun

SHORT = ["bench", "scaling", "--model", "logistic", "--seconds", "0.1", "--rounds", "2"]


def test_two_launches_and_the_table(mpirun: MpiRun, tmp_path: Path) -> None:
    what = ["--what", "sync", "kstep", "async:gsgm", "async:asgd", "hierarchical", "--every", "2"]
    mpirun.cli([*SHORT, "--out", tmp_path, *what], n=1)
    target = ["--target", "0.3", "--lr", "0.02", "1e-9", "--epochs", "1", "--kinds", "weak"]
    mpirun.cli([*SHORT, "--out", tmp_path, *what, *target], n=2)
    alone, two = (json.loads(next(tmp_path.glob(f"ranks-{n}-*.json")).read_text()) for n in (1, 2))
    assert [row["what"] for row in alone["rows"]].count("torch") == 4  # weak and strong, two rounds
    assert len(two["rows"]) == 10 and {row["ranks"] for row in two["rows"]} == {2}
    for row in [*alone["rows"], *two["rows"]]:
        assert 0 < row["samples_per_second"] <= row["own"] * 1.01
        assert row["compute"] + row["communicate"] + row["wait"] == pytest.approx(1, abs=0.01)
        assert len(row["by_rank"]) == row["ranks"]
    asynchronous = [row for row in two["rows"] if row["what"] == "async:asgd"]
    assert all(row["staleness"] >= 0 for row in asynchronous)
    for row in two["rows"]:
        quick, never = row["trainings"]
        assert quick["to_target"] > 0 and quick["accuracy"] >= 0.3 and 0 < quick["epochs_to_target"] <= 1.1
        assert math.isnan(never["to_target"]) and never["accuracy"] < 0.3
    assert "torch" in mpirun.cli(["bench", "scaling", "--table", "--out", tmp_path], n=None).stdout
    assert (tmp_path / "scaling.csv").exists() and (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".*"))  # written under temporary names


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # nothing of MPI in it
def test_a_slow_rank_holds_up_the_others_in_step_only(mpirun: MpiRun, tmp_path: Path) -> None:
    what = ["--kinds", "weak", "--what", "sync", "async:asgd"]
    # Long enough for many steps on a busy machine: the quick rank waits for all of the slow one's but the last.
    words = [*what, "--slow", "1:20", "--seconds", "1", "--rounds", "1", "--out", tmp_path]
    mpirun.cli([*SHORT, *words], n=2)
    rows = json.loads(next(tmp_path.glob("ranks-2-*.json")).read_text())["rows"]
    for row in rows:
        quick, slow = row["by_rank"]
        if row["what"] == "sync":
            assert quick < 2 * slow
        else:
            assert quick > 3 * slow


BAD = {
    "--slow 1:0.5": ["slower", "0.5"],
    "--global-batch 129": ["129", "2 ranks"],
    "--slow 5:2": ["--slow"],
    "--seconds 0": ["--seconds"],
    "--rounds 0": ["--rounds"],
    "--target 90": ["--target", "0.9"],
    "--lr -1": ["lr", "-1"],
    "--what async:adam": ["adam"],
    "--seconds inf": ["--seconds", "finite"],
    "--every 0": ["--every", "at least 1"],
    "--every 4 --what sync": ["--every", "kstep"],
    "--what sync:easgd": ["easgd"],
    "--what sync hierarchical:easgd": ["easgd"],
    "--batch 99999999": ["99999999"],
    "--data nothing": ["nothing"],
    "--out /proc/x": ["/proc/x"],
}


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_bad_input_is_found_before_anything_is_measured(mpirun: MpiRun) -> None:
    disk = mpirun.folder / "disk"
    disk.mkdir()
    full = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode == 0
    bad = BAD | ({f"--out {disk}": ["the disk is full", str(disk)]} if full else {})
    try:
        everyone = run_cases(mpirun, [[*SHORT, "--out", "out", *words.split()] for words in bad], 2)
        assert not list(disk.iterdir())
    finally:
        if full:
            subprocess.run(["umount", disk], check=True)
    for found in everyone:
        assert [code for code, _, _ in found] == [2] * len(bad)
    for (words, parts), (_, text, _) in zip(bad.items(), everyone[0], strict=True):
        assert all(part in text for part in parts), (words, text)
        assert "Traceback" not in text and "samples/s" not in text
