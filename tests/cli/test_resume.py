"""Stopped by a signal, resumed, and the same as never stopped: real signals to real ranks, in all modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.mpi import MpiRun

# Sends real signals to itself at exact steps: {rank: step}; the handlers and all that follows are the program's own.
PROGRAM = """
import json, os, signal, sys
from hpcasync.train import signals
signals.install()
from hpcasync import init
from hpcasync.cli import main
from hpcasync.train import agreement
from hpcasync.train.progress import Progress

agreement.LOOK_SECONDS = 0.0  # ask after every step: these runs last a fraction of a second
at = {int(r): s for r, s in json.loads(sys.argv[1]).items()}
name, argv, seen, rank = sys.argv[2], sys.argv[3:], 0, init().rank
plain = Progress.step

def step(self, *args):
    global seen
    seen += 1
    if at.get(rank) == seen:
        os.kill(os.getpid(), getattr(signal, name))
    plain(self, *args)

Progress.step = step
sys.exit(main(argv))
"""

MODEL = (
    "import torch\\n"
    "def net(shape, classes):\\n"
    "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.BatchNorm1d(24),\\n"
    "        torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(24, classes))\\n"
).replace("\\n", "\n")

MODES = {
    "sync": ["--mode", "sync", "--base", "adam", "--schedule", "cosine"],
    "kstep": ["--mode", "kstep", "--every", "7", "--block-momentum", "0.5", "--base", "momentum", "--lr", "0.02"],
    "guided": ["--mode", "sync", "--guided", "--rho", "4", "--base", "momentum", "--lr", "0.02"],
}
pytestmark = pytest.mark.timeout(600)  # several launches each
COMMON = ["train", "--model", "mynet:net", "--epochs", "3", "--batch", "32", "--json", "--seed", "3"]
TIMES = ("seconds", "samples_per_second", "share", "resumed_from", "restarts")


def result_of(stdout: str) -> dict[str, Any]:
    """The object on the last line of standard output."""
    found: dict[str, Any] = json.loads(stdout.rstrip("\n").split("\n")[-1])
    return found


def numbers(path: Path) -> dict[str, bytes]:
    """Every array of a checkpoint but the states' texts."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return {n: v for n, v in found.items() if n != "facts" and not n.endswith("/state")}


def newest(folder: Path) -> Path:
    return sorted(folder.glob("checkpoint-*.h5"))[-1]


def stopped(mpirun: MpiRun, at: dict[int, int], argv: list[str], n: int | None, name: str = "SIGUSR1") -> dict[str, Any]:
    """Run until the signals stop it; the object it prints."""
    done = mpirun(PROGRAM, n, args=[json.dumps(at), name, *argv], check=False, timeout=120)
    assert done.returncode == 75, (done.returncode, done.stderr)
    assert f"stopped by {name}" in done.stderr and "Traceback" not in done.stderr
    result = result_of(done.stdout)
    assert result["stopped"] == name and Path(mpirun.folder / result["checkpoint"]).exists()
    assert not list(mpirun.folder.glob("*/run.lock"))
    return result


@pytest.fixture
def model(mpirun: MpiRun) -> None:
    (mpirun.folder / "mynet.py").write_text(MODEL)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("model")
def test_stopped_twice_and_resumed_gives_the_same_bits(mpirun: MpiRun, mode: str, ranks: int) -> None:
    if mpirun.lane.name != "mpich" and (ranks != 2 or mode == "guided"):
        pytest.skip("the second MPI library runs this with 2 ranks only")
    argv = [*COMMON, *MODES[mode]]
    whole = result_of(mpirun.cli([*argv, "--output", "whole"], ranks, timeout=120).stdout)
    parts = [*argv, "--output", "parts", "--resume", "auto"]
    first = stopped(mpirun, {ranks - 1: 2}, parts, ranks)
    assert first["epoch"] == 1 and first["step"] >= 2
    second = stopped(mpirun, dict.fromkeys(range(ranks), 18), parts, ranks, "SIGTERM")
    assert second["restarts"] == 1 and (second["epoch"], second["step"]) > (first["epoch"], first["step"])
    last = result_of(mpirun.cli(parts, ranks, timeout=120).stdout)
    assert last["restarts"] == 2 and last["resumed_from"].endswith(".h5")
    assert {k: v for k, v in last.items() if k not in TIMES} == {k: v for k, v in whole.items() if k not in TIMES}
    a, b = numbers(newest(mpirun.folder / "whole")), numbers(newest(mpirun.folder / "parts"))
    assert a.keys() == b.keys() and [n for n in a if a[n] != b[n]] == []
    rows = [(mpirun.folder / d / "metrics.jsonl").read_text().splitlines() for d in ("whole", "parts")]
    for one, other in zip(*rows, strict=True):
        x, y = json.loads(one), json.loads(other)
        assert {**x, "seconds": 0} == {**y, "seconds": 0}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rule", ["trend-smooth", "gsgm", "easgd", "dc-asgd"])
@pytest.mark.usefixtures("model")
def test_async_stops_in_the_middle_and_goes_on(mpirun: MpiRun, rule: str, ranks: int) -> None:
    if mpirun.lane.name != "mpich" and (ranks == 1 or rule in ("easgd", "dc-asgd")):
        pytest.skip("the second MPI library runs this for two rules on several ranks")
    argv = [*COMMON, "--mode", "async", "--rule", rule, "--staleness", "4", "--output", "run", "--resume", "auto"]
    first = stopped(mpirun, {ranks - 1: 5}, argv, ranks)
    assert first["epoch"] == 1 and first["step"] > 0
    saved = newest(mpirun.folder / "run")
    with h5py.File(saved) as file:
        places = [json.loads(file[f"ranks/{r}/state"][()].tobytes())["parts"]["run"]["place"] for r in range(ranks)]
    done = mpirun.cli(argv, ranks, timeout=120)
    result = result_of(done.stdout)
    steps = -(-1438 // ranks // 32)
    assert result["updates"] == 3 * steps * ranks and result["restarts"] == 1
    assert all(0 < p["steps"] <= steps for p in places)
    with h5py.File(mpirun.folder / "run" / "run.h5") as file:
        assert file["ranks/samples"][:].sum() == 3 * 1438
    assert result["test_accuracy"] > 0.5


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.usefixtures("model")
def test_one_rank_in_mode_async_is_exact_too(mpirun: MpiRun) -> None:
    argv = [*COMMON, "--mode", "async", "--rule", "trend-smooth", "--base", "adam"]
    mpirun.cli([*argv, "--output", "whole"], None)
    parts = [*argv, "--output", "parts", "--resume", "auto"]
    stopped(mpirun, {0: 61}, parts, None)
    mpirun.cli(parts, None)
    a, b = numbers(newest(mpirun.folder / "whole")), numbers(newest(mpirun.folder / "parts"))
    assert a.keys() == b.keys() and [n for n in a if a[n] != b[n]] == []


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize(("mode", "said"), [("sync", ""), ("kstep", "their mean"), ("async", "")])
@pytest.mark.usefixtures("model")
def test_on_other_ranks_it_goes_on_and_says_what_was_reset(mpirun: MpiRun, mode: str, said: str) -> None:
    rule = {"async": ["--mode", "async", "--rule", "gsgm"]}.get(mode) or MODES[mode]
    argv = [*COMMON, *rule, "--checkpoint-every", "10", "--output", "run", "--resume", "auto"]
    stopped(mpirun, {0: 26}, argv, 2)
    for path in sorted((mpirun.folder / "run").glob("checkpoint-*.h5"))[1:]:
        path.unlink()  # kstep stops at an average: the one before lies inside a block
    done = mpirun.cli(argv, 3, timeout=120)
    result = result_of(done.stdout)
    assert result["ranks"] == 3 and result["test_accuracy"] > 0.4
    assert "made by 2 ranks, now 3. Reset: " in done.stderr
    assert any("random numbers" in text for text in result["reset"])
    assert said in done.stderr
    if mode == "async":
        assert "last_gradient of rule gsgm" in done.stderr
    with h5py.File(mpirun.folder / "run" / "run.h5") as file:
        assert file["ranks/samples"][:].sum() >= 3 * 1438


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_finished_run_resumed_gives_its_result_again_and_more_epochs_go_on(mpirun: MpiRun) -> None:
    argv = ["train", "--mode", "sync", "--json", "--output", "run"]
    first = result_of(mpirun.cli([*argv, "--epochs", "2"], 2).stdout)
    again = result_of(mpirun.cli([*argv, "--epochs", "2", "--resume", "auto"], 2).stdout)
    assert again["test_loss"] == first["test_loss"] and again["updates"] == first["updates"]
    more = result_of(mpirun.cli([*argv, "--epochs", "3", "--resume", "auto"], 2).stdout)
    assert more["epochs"] == 3 and more["test_loss"] < first["test_loss"]
    assert len((mpirun.folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(list((mpirun.folder / "run").glob("checkpoint-*.h5"))) == 2
    other = result_of(mpirun.cli(["train", "--mode", "sync", "--json", "--epochs", "4", "--resume", "run"], 2).stdout)
    assert other["resumed_from"] == str(newest(mpirun.folder / "run").relative_to(mpirun.folder))
    assert len(list(mpirun.folder.glob("runs/*/result.json"))) == 1


LAUNCHER = """
import glob
import os, signal, subprocess, sys, time
job = subprocess.Popen(sys.argv[2:])
while not glob.glob("run/checkpoint-*.h5") and job.poll() is None:
    time.sleep(0.05)
job.send_signal(getattr(signal, sys.argv[1]))
print("CODE", job.wait())
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_mpiexec_reaches_the_ranks(mpirun: MpiRun, name: str) -> None:
    lane = mpirun.lane
    if lane.name != "mpich" and name == "SIGTERM":
        pytest.skip("what Open MPI's mpiexec does with SIGTERM has not been measured; Slurm sends it to the ranks")
    train = ["train", "--mode", "async", "--epochs", "4000", "--eval-every", "4000", "--checkpoint-every", "20"]
    command = [lane.mpiexec, *lane.flags, "-n", "2", *lane.cli, *train, "--output", "run"]
    done = mpirun(LAUNCHER, None, args=[name, *command], timeout=120)
    assert "CODE 75" in done.stdout and f"stopped by {name}" in done.stderr
    assert not (mpirun.folder / "run" / "run.lock").exists()
