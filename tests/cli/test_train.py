"""``hpcasync train`` through its console script, under real mpiexec: results, records, configuration."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.cli.cases import run_cases
from tests.mpi import MpiRun

MODES = {
    "async": ["--mode", "async", "--rule", "trend-smooth", "--base", "momentum"],
    "sync": ["--mode", "sync", "--base", "momentum"],
    "kstep": ["--mode", "kstep", "--every", "8", "--block-momentum", "0.5", "--base", "momentum", "--lr", "0.01"],
}


def result_of(stdout: str) -> dict[str, Any]:
    """The object on the last line of standard output."""
    found: dict[str, Any] = json.loads(stdout.rstrip("\n").split("\n")[-1])
    return found


def trained(mpirun: MpiRun, commands: list[list[str | Path]], ranks: int, **options: Any) -> list[tuple[dict[str, Any], str]]:
    """Train with each of these command lines, in one job; result and standard error of rank 0."""
    found = run_cases(mpirun, [["train", *argv, "--json"] for argv in commands], ranks, **options)
    assert all(code == 0 for rank in found for code, _, _ in rank), found[0]
    return [(result_of(out), err) for _, err, out in found[0]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_train_learns_and_reports(mpirun: MpiRun, ranks: int) -> None:
    if mpirun.lane.name != "mpich" and ranks != 2:
        pytest.skip("the second MPI library runs this with 2 ranks only")
    commands = [[*flags, "--epochs", "6", "--batch", "16", "--output", mode] for mode, flags in MODES.items()]
    for mode, (result, stderr) in zip(MODES, trained(mpirun, commands, ranks), strict=True):
        check_trained(mpirun.folder / mode, mode, ranks, result, stderr)


def check_trained(folder: Path, mode: str, ranks: int, result: dict[str, Any], stderr: str) -> None:
    """That it has learned, and that result and records say so."""
    assert result["test_accuracy"] > 0.88
    assert result["train_loss"] < 0.5 and result["test_loss"] < 0.6
    assert result["ranks"] == ranks and result["mode"] == mode and result["seed"] == 0
    assert result["rule"] == ("trend-smooth" if mode == "async" else "plain")
    assert result["samples_per_second"] > 0 and result["seconds"] > 0
    steps = 6 * -(-1438 // ranks // 16)
    assert abs(result["updates"] - (steps if mode == "sync" else steps * ranks)) <= 6 * ranks
    assert set(result["staleness"]) == {"mean", "p50", "p95", "max"}
    assert abs(sum(result["share"].values()) - 1) < 1e-6
    assert set(result["share"]) == {"compute", "communicate", "wait"}
    if mode != "async" or ranks == 1:
        assert result["staleness"]["max"] == 0
    assert json.loads((folder / "result.json").read_text()) == result
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with h5py.File(folder / "run.h5") as file:
        assert file["curves/test_accuracy"][-1] == result["test_accuracy"]
        assert file["ranks/samples"][:].sum() == 6 * 1438
        assert np.all(np.diff(file["curves/seconds"][:]) > 0)
        assert file["ranks/staleness"].shape[0] == ranks
    assert "epoch 6/6" in stderr and "\x1b" not in stderr


def test_the_same_seed_gives_the_same_bits(mpirun: MpiRun) -> None:
    """In one process after other trainings, and in another one; another seed gives others."""
    modes = ("sync", "kstep")
    same, other = ([[*MODES[mode], "--epochs", "2", "--seed", seed] for mode in modes] for seed in ("5", "6"))
    first, second = trained(mpirun, same + other, 3), trained(mpirun, same, 3)
    for number in range(len(modes)):
        (one, _), (again, _), (another, _) = first[number], second[number], first[number + len(modes)]
        for key in ("test_loss", "train_loss", "test_accuracy"):
            assert one[key] == again[key]
        assert another["test_loss"] != one["test_loss"]


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_config_file_flags_win_and_the_resolved_one_is_kept_a_slow_rank_changes_no_bit(mpirun: MpiRun) -> None:
    (mpirun.folder / "run.toml").write_text(
        'mode = "kstep"\nevery = 4\nblock-momentum = 0.3\nbase = "adam"\nlr = 0.01\nbetas = [0.8, 0.99]\nepochs = 9\n'
    )
    args = ["train", "--config", "run.toml", "--epochs", "2", "--json", "--output"]
    first = result_of(mpirun.cli([*args, "a"], 2).stdout)
    assert first["epochs"] == 2 and first["mode"] == "kstep" and first["base"] == "adam"
    kept = mpirun.folder / "a" / "config.toml"
    text = kept.read_text()
    for line in ("every = 4", "block_momentum = 0.3", "epochs = 2", "lr = 0.01", "seed = 0"):
        assert line in text
    again = result_of(mpirun.cli(["train", "--config", kept, "--output", "b", "--json", "--slow", "1:30"], 2).stdout)
    assert again["test_loss"] == first["test_loss"]
    assert again["artificially_slow"] == {"1": 30.0} and "artificially_slow" not in first
    with h5py.File(mpirun.folder / "b" / "run.h5") as file:
        quick, slow = file["ranks/compute"][:]
        assert slow > 3 * quick and file["ranks/wait"][0] > file["ranks/wait"][1]


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_default_output_folder_and_refusal_to_overwrite(mpirun: MpiRun) -> None:
    mpirun.cli(["train", "--epochs", "1"], None)
    (run,) = (mpirun.folder / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-digits-mlp-async", run.name)
    done = mpirun.cli(["train", "--epochs", "1", "--output", run], 2, check=False)
    assert done.returncode == 2 and "holds a run already" in done.stderr


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_users_own_model(mpirun: MpiRun) -> None:
    (mpirun.folder / "mynet.py").write_text(
        "import torch\n"
        "def net(shape, classes):\n"
        "    n = 1\n"
        "    for s in shape: n *= s\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(n, 32), torch.nn.BatchNorm1d(32),\n"
        "        torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, classes))\n"
    )
    args = ["train", "--model", "mynet:net", "--epochs", "3", "--json", "--batch", "16"]
    assert result_of(mpirun.cli(args, 2).stdout)["test_accuracy"] > 0.85


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_more_ranks_than_cores_finish(mpirun: MpiRun) -> None:
    done = mpirun.cli(["train", "--epochs", "2", "--staleness", "2", "--json"], 8, timeout=250)
    assert result_of(done.stdout)["ranks"] == 8


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_demo(mpirun: MpiRun) -> None:
    done = mpirun.cli(["demo", "--output", "demo"], None, timeout=350)
    assert "Trend-Smooth" in done.stdout and "staleness" in done.stdout and "wait" in done.stdout
    picture = Path(re.search(r"learning curves: (\S+\.png)", done.stdout)[1])  # type: ignore[index]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "epoch 1/" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_fashion_mnist_reaches_86_percent_on_4_ranks(mpirun: MpiRun) -> None:
    if not os.environ.get("HPCASYNC_DATA"):
        pytest.skip("HPCASYNC_DATA is not set: no real Fashion-MNIST here")
    flags = {"async": ["--rule", "trend-smooth"], "sync": [], "kstep": ["--every", "16", "--block-momentum", "0.5"]}
    args = ["--data", "fashion-mnist", "--model", "lenet5", "--base", "momentum", "--epochs", "3"]
    done = trained(mpirun, [[*args, "--mode", mode, *more] for mode, more in flags.items()], 4, timeout=500)
    for mode, (result, _) in zip(flags, done, strict=True):
        assert result["test_accuracy"] >= 0.86, mode
