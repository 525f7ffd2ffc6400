"""The comparison of live runs with their simulation, in its quick form: real ranks; how well times agree is not asserted."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_convergence import FOLDER


@pytest.mark.slow
def test_quick_comparison(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "live.py"), "--quick", "--output", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=350, check=True)
    assert "samples/s within 15 %" in first.stdout and "staleness within 20 %" in first.stdout
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["case"], row["ranks"]) for row in rows] == [("asgd", "2"), ("gsgm, shards:5", "2")]
    for row in rows:
        for side in ("live", "simulated"):
            assert float(row[f"{side}_samples_per_second"]) > 0 and float(row[f"{side}_accuracy"]) > 20
        # Two ranks see about one update of the other, whatever the times are.
        assert abs(float(row["live_staleness"]) - float(row["simulated_staleness"])) < 0.5
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/live/result.json")]
    assert {r["rule"]: ("discarded" in r, r["lock_free"]) for r in records} == {"asgd": (False, False), "gsgm": (True, False)}
    again = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    assert again.stdout == first.stdout
