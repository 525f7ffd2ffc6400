"""What happened inside the method is in a run's rows and in its file: live on both MPIs, and simulated."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcasync.cli import main
from tests.mpi import MpiRun

COMMON = {"data": "digits", "model": "mlp", "epochs": 2, "batch": 64}
LAYERS = [f"{i}.{kind}" for i in (1, 3, 5) for kind in ("weight", "bias")]
BLOCKS = {"block_momentum": 0.9, "every": 4}
RUNS = {
    "guided": {"rule": "trend-smooth", "guided": True, "rho": 4},
    "turns": {"rule": "gsgm"},
    "kstep": {"mode": "kstep"} | BLOCKS,
    "hierarchical": {"mode": "hierarchical", "groups": 2, "rule": "trend-smooth"} | BLOCKS,
}


def inside(run: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    with h5py.File(run / "run.h5") as file:
        found = {name: (json.loads(data.attrs["columns"]), data[:]) for name, data in file["inside"].items()}
    rows = [json.loads(line)["inside"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, (columns, values) in found.items():
        assert [[row[name][c] for c in columns] for row in rows] == values.tolist()
    return found


def test_live(mpirun: MpiRun, tmp_path: Path) -> None:
    mpirun(
        f"""
        from hpcasync.train.loop import train
        from hpcasync.train.config import make_config
        for name, keys in {RUNS!r}.items():
            train(make_config({COMMON!r} | keys | {{"output": {str(tmp_path)!r} + "/" + name}}))
        """,
        n=2,
    )
    found = {name: inside(tmp_path / name) for name in RUNS}
    assert {name: list(tables) for name, tables in found.items()} == {
        "guided": ["scores", "shrink_share"],
        "turns": ["out_of_turn"],
        "kstep": ["block_momentum"],
        "hierarchical": ["block_momentum", "shrink_share"],
    }
    for name, table in [(name, table) for tables in found.values() for name, table in tables.items()]:
        columns, values = table
        assert values.shape == (2, len(columns)) and np.isfinite(values).all()
        if name == "shrink_share":
            assert columns == LAYERS and (values > 0).all() and (values < 1).all()
        elif name == "block_momentum":
            assert columns == LAYERS and (values > 0).all()
        elif name == "scores":
            assert (np.diff(values) >= 0).all() and values[0, -1] > values[0, 0]
        else:
            assert columns == ["rank 0", "rank 1"]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_simulated_in_one_piece_as_layer_by_layer(mode: str, tmp_path: Path) -> None:
    """A compiled gradient is one piece, one of autograd is a piece per parameter."""
    found = []
    for name, flag in (("compiled", []), ("naive", ["--naive"])):
        words = [str(x) for key, value in COMMON.items() for x in (f"--{key}", value)]
        words += ["--mode", mode, "--rule", "trend-smooth", "--workers", "4", "--base", "adam", *flag]
        assert main(["simulate", *words, "--output", str(tmp_path / name)]) == 0
        found.append(inside(tmp_path / name)["shrink_share"])
    (columns, one), (_, other) = found
    assert columns == LAYERS and one.shape == (2, 6)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_simulated_block_momentum_scores_and_turns(tmp_path: Path) -> None:
    words = [str(x) for key, value in COMMON.items() for x in (f"--{key}", value)]
    for name, more in {
        "turns": ["--rule", "gsgm", "--workers", "3", "--slow", "2:3"],
        "momentum": ["--mode", "kstep", "--block-momentum", "0.9", "--every", "3", "--workers", "2"],
        "scores": ["--rule", "asgd", "--guided", "--rho", "4", "--workers", "2"],
    }.items():
        assert main(["simulate", *words, *more, "--output", str(tmp_path / name)]) == 0
    columns, held = inside(tmp_path / "turns")["out_of_turn"]
    assert columns == ["rank 0", "rank 1", "rank 2"]
    assert held[0, 2] == 0 and (held[:, :2] > 2).all()  # who is slow holds the others up
    assert (inside(tmp_path / "momentum")["block_momentum"][1] > 0).all()
    assert len(inside(tmp_path / "scores")["scores"][0]) == 5
