"""The runs that all tests of reports look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcasync.cli import main
from tests.report.runs import simulate


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of trend-smooth, and one run of each other method that shows what happens inside it."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "seed0": ["--rule", "trend-smooth", "--seed", "0"],
        "seed1": ["--rule", "trend-smooth", "--seed", "1"],
        "turns": ["--rule", "gsgm", "--workers", "12", "--compute", "lognormal:1,0.3"],
        "guided": ["--rule", "asgd", "--guided", "--rho", "4", "--workers", "2"],
        "blocks": ["--mode", "kstep", "--every", "4", "--block-momentum", "0.9"],
    }
    return {name: simulate(folder / name, *words) for name, words in kinds.items()}


@pytest.fixture(scope="session")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about all of them."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", *map(str, runs.values()), "-o", str(path)]) == 0
    return path
