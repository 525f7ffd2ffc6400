"""Every convergence recipe runs in its quick form: tables, picture, claims with a verdict, and resumption."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "convergence"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_") and p.stem not in ("live", "main_job"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_quick_recipe(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--output", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=350, check=True)
    assert "held:" in first.stdout
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert rows and all(float(row["accuracy_mean"]) > 0 for row in rows)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    again = subprocess.run(command, capture_output=True, text=True, timeout=350, check=True)
    assert again.stdout == first.stdout
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()} == kept
