"""An installed package finds its sites: the folder `slurm` of the repository travels in the wheel and in the sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi import REPO


@pytest.mark.slow
def test_the_wheel_of_an_sdist_has_sites_and_template(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tree)
    for name in ("hpcasync", "slurm"):
        shutil.copytree(REPO / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*words: str | Path, cwd: Path, **env: str) -> str:
        full = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
        done = subprocess.run([sys.executable, *words], cwd=cwd, env=full, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    backend = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
    sdist = run("-c", backend.format("sdist", str(tmp_path)), cwd=tree).split()[-1]
    shutil.unpack_archive(tmp_path / sdist, tmp_path)
    unpacked = tmp_path / sdist.removesuffix(".tar.gz")
    wheel = run("-c", backend.format("wheel", str(tmp_path)), cwd=unpacked).split()[-1]
    shutil.unpack_archive(tmp_path / wheel, tmp_path / "installed", "zip")
    words = ("-m", "hpcasync", "submit", "--site", "lumi-g", "--nodes", "2", "-A", "p", "--dry-run", "--", "list")
    script = run(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert "#SBATCH --partition=standard-g" in script
    assert run(
        "-c", "import hpcasync; print(hpcasync.__file__)", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed")
    ).startswith(str(tmp_path / "installed"))
