"""Every benchmark runs in its quick form and writes its results; no time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi import Lane, MpiRun

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
FACTS = {"bystander"}
"""Scripts that show what an MPI library does, and compare no two sides."""


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in FACTS])
def test_quick_run(name: str, lane: Lane, mpirun: MpiRun, tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    done = mpirun(FOLDER / f"{name}.py", None, args=["--quick", "--json", kept], timeout=300)
    found = json.loads(kept.read_text())
    assert found["benchmark"] == name
    assert {"cores", "cpu", "mpi", "torch", "numba"} <= found["machine"].keys()
    assert f"{name}: " in done.stdout
    assert found["rows"]
    for row in found["rows"]:
        assert all(s["q25"] <= s["median"] <= s["q75"] for s in row["seconds"].values())
        assert row["ratios"]


def test_every_script_is_described() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"`{name}.py`" not in text] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_does_not_start_mpi(name: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(FOLDER / (name + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    sys.exit(end.code or ('mpi4py' in sys.modules))\n"
    )
    env = {"PYTHONPATH": str(FOLDER), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
