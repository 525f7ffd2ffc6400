"""Recorded runs: every step comes again, in blocks common to all ranks; messages, exchanges, meetings, pauses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcasync.backoff import LONGEST, SHORTEST
from hpcasync.data import Dataset
from hpcasync.simulate.like import read_like
from hpcasync.simulate.polling import SLACK, noticed
from hpcasync.train.step_log import BLOCK, MEETING, write_steps
from tests.simulate.toys import run

STEPS = 2 * 96 // 2 // 4


def record(folder: Path, steps: list[np.ndarray], meeting: float = 0.0, epochs: int = 2) -> Path:
    """A run file as a live run leaves it: per rank (steps, 3), and every meeting of the slowest rank as long as said."""
    with h5py.File(folder / "run.h5", "w") as file:
        for column, name in enumerate(("compute", "communicate", "wait")):
            file[f"ranks/{name}"] = [s[:, column].sum() for s in steps]
        file["ranks/updates"] = file["ranks/seconds"] = [len(s) for s in steps]
        file["ranks/skipped"] = [0] * len(steps)
        most = max(s.sum() for s in steps)
        meetings = [np.tile(np.array([0, 0, meeting + (most - s.sum()) / epochs, s.sum() / epochs]), (epochs, 1)) for s in steps]
        assert meetings[0].shape[1] == len(MEETING)
        write_steps(file, [{"steps": s, "meetings": m, "every": 1} for s, m in zip(steps, meetings, strict=True)])
    return folder


def times(count: int, seed: int, **columns: float) -> np.ndarray:
    found = np.zeros((count, 3), np.float32)
    found[:, 0] = 1 + np.random.default_rng(seed).random(count)
    for column, name in enumerate(("compute", "communicate", "wait")):
        if name in columns:
            found[:, column] = columns[name]
    return found


def test_all_steps_come_again_in_common_blocks(tmp_path: Path) -> None:
    steps = [times(5 * BLOCK + 3, r) for r in range(2)]
    recording = read_like(record(tmp_path, steps)).recording
    assert recording is not None
    drawn = [recording.draw(r, 0, 0) for r in range(2)]
    for mine, own in zip(drawn, steps, strict=True):
        assert sorted(mine[:, 0]) == sorted(own[:, 0].astype(float))
    places = [[int(np.flatnonzero(own[:, 0] == value)[0]) for value in mine[:, 0].astype(np.float32)]
              for mine, own in zip(drawn, steps, strict=True)]  # fmt: skip
    assert places[0] == places[1] != sorted(places[0])
    assert (recording.draw(2, 0, 0) == drawn[0]).all()  # a third worker is like the first
    assert (recording.draw(0, 0, 1) != drawn[0]).any() and (recording.draw(0, 1, 0) != drawn[0]).any()


def test_a_run_of_as_many_steps_lasts_as_long(data: Dataset, tmp_path: Path) -> None:
    steps = [times(STEPS, r, communicate=0.25, wait=0.125) for r in range(2)]
    record(tmp_path, steps, meeting=0.5)
    keys: dict[str, Any] = {"workers": 2, "like": str(tmp_path)}
    found = run(data, **keys)
    half = STEPS // 2
    slowest = sum(max(s[part].sum() for s in steps) for part in (slice(half), slice(half, None)))
    assert found.result["virtual_seconds"] == pytest.approx(slowest + 2 * 0.5, rel=1e-5)
    for rank, own in zip(found.ranks, steps, strict=True):
        assert rank["compute"] == pytest.approx(own[:, 0].sum(), rel=1e-5)
        assert rank["communicate"] == pytest.approx(STEPS * (0.25 + 0.125) + 2 * 0.5, rel=1e-5)


def test_an_average_costs_what_it_cost(data: Dataset, tmp_path: Path) -> None:
    steps = [times(STEPS, r, compute=1.0) for r in range(2)]
    for own in steps:
        own[2::3, 1] = 0.5
    record(tmp_path, steps)
    found = run(data, mode="kstep", rule="plain", every=3, workers=2, like=str(tmp_path))
    assert found.result["virtual_seconds"] == pytest.approx(STEPS + STEPS // 3 * 0.5)


def test_a_run_file_without_steps_gives_its_means(data: Dataset, tmp_path: Path) -> None:
    with h5py.File(record(tmp_path, [times(STEPS, 0, compute=1.0, communicate=0.5)]) / "run.h5", "a") as file:
        del file["steps"]
    found = run(data, workers=2, like=str(tmp_path))
    assert read_like(tmp_path).recording is None
    assert found.result["virtual_seconds"] == pytest.approx(STEPS * 1.5)


def test_recorded_compute_draws_single_steps(tmp_path: Path) -> None:
    from hpcasync.simulate.distributions import parse_distribution

    steps = [times(40, r) for r in range(2)]
    values = parse_distribution(f"recorded:{record(tmp_path, steps) / 'run.h5'}").values
    assert values is not None and sorted(values) == sorted(np.concatenate(steps)[:, 0].astype(float))


def test_a_waiting_rank_looks_again_after_growing_pauses() -> None:
    assert noticed(0) == 0
    assert noticed(1e-9) == SHORTEST + SLACK == noticed(SHORTEST + SLACK)
    assert noticed(2 * SHORTEST + SLACK) == pytest.approx(3 * SHORTEST + 2 * SLACK)
    for waited in np.geomspace(1e-6, 1, 50):
        assert waited <= noticed(waited) <= waited + LONGEST + SLACK + 1e-9
    looks = {noticed(w) for w in np.linspace(0, 0.01, 10_000)}
    assert np.diff(sorted(looks)).min() == pytest.approx(SHORTEST + SLACK)
    assert np.diff(sorted(looks))[-1] == pytest.approx(LONGEST + SLACK)
