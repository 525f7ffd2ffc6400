"""``train --stall-seconds``: a rank that hangs is named, the job ends with a checkpoint, and the run goes on from it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.checkpoints import newest, numbers
from tests.cli.test_train import result_of
from tests.comm.test_backends import need
from tests.hosts import HostsRun
from tests.mpi import REPO, Lane, MpiRun, processes_of

# A user's model that does as PLAN says: [rank, training (or evaluating), call, what], where every rank counts its own calls.
MODEL = """
import json, os, signal, time
import torch
import hpcasync

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers = torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, classes)
        self.body = torch.nn.Sequential(*layers)
        self.calls = {True: 0, False: 0}

    def forward(self, x):
        self.calls[self.training] += 1
        for rank, training, call, what in json.loads(os.environ.get("PLAN", "[]")):
            if rank == hpcasync.init().rank and training == self.training and call == self.calls[training]:
                if what == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif what == "pid":
                    with open(f"pid-{rank}.tmp", "w") as file:
                        file.write(str(os.getpid()))
                    os.rename(f"pid-{rank}.tmp", f"pid-{rank}")
                else:
                    time.sleep(what)
        return self.body(x)

def net(shape, classes):
    return Net(classes)
"""
pytestmark = pytest.mark.timeout(900)  # up to three jobs on a machine that may be busy
FOR_EVER = 10**6
EVALUATION = 2  # first call of an evaluation; the one before tries the model
CODES = {"mpich": (76, 9), "openmpi": (76,)}  # MPICH's mpiexec ends with 9 when it looks first at a rank that it has killed
TRAIN = ["train", "--model", "mynet:net", "--json", "--seed", "3", "--batch", "32"]


@pytest.fixture
def run(mpirun: MpiRun) -> MpiRun:
    (mpirun.folder / "mynet.py").write_text(MODEL)
    return mpirun


def hung(run: MpiRun, argv: list[str], plan: list[list[Any]], n: int, **env: str) -> str:
    """What a job says that stalls, on standard error."""
    done = run.cli([*TRAIN, *argv], n, env={"PLAN": json.dumps(plan), **env}, check=False, timeout=300)
    assert done.returncode in CODES[run.lane.name], (done.returncode, done.stderr)
    assert processes_of(run.last_token) == []  # the stopped ones too
    return done.stderr


def missing(rank: int, place: str) -> str:
    """The pattern that tells so; on a machine so busy that another rank is not heard of, that one is named too."""
    return rf"stalled: ranks? (\d, )*{rank}(, \d)* ha(s|ve) not come to {place}, where ranks? [\d, ]+ waited"


def test_user_code_that_never_returns_in_sync(run: MpiRun) -> None:
    argv = ["--mode", "sync", "--base", "adam", "--schedule", "cosine", "--epochs", "3", "--eval-every", "3"]
    parts = [*argv, "--stall-seconds", "3", "--output", "parts", "--resume", "auto"]
    said = hung(run, parts, [[1, True, 20, FOR_EVER]], 3)
    assert re.search(missing(1, "the average of the gradients of step 20"), said)
    assert "alive, in step 20" in said and "rank 1 is missing" in said and "time.sleep(what)" in said
    saved = newest(run.folder / "parts")
    assert f"Checkpoint parts/{saved.name}" in said
    done = run.cli([*TRAIN, *parts], 3)
    # A machine so loaded that rank 0 seems silent lets rank 2 save.
    assert re.search("epoch 2, step 4; saved by rank [02] of 3, when another one hung", done.stderr)
    result = result_of(done.stdout)
    assert result["updates"] == 3 * 15 and result["restarts"] == 1
    if run.lane.name == "mpich":  # and nothing was lost, for no random numbers are drawn
        whole = result_of(run.cli([*TRAIN, *argv, "--output", "whole"], 3).stdout)
        assert whole["test_loss"] == result["test_loss"]
        a, b = (numbers(newest(run.folder / name)) for name in ("whole", "parts"))
        assert a and [name for name in a if name.startswith("model/") and a[name] != b[name]] == []


def test_the_stopped_first_rank_of_kstep(run: MpiRun) -> None:
    """Rank 0, which writes all checkpoints else, is stopped from outside wherever it is."""
    thread = threading.Thread(target=_stop, args=(run.folder / "pid-0",), daemon=True)
    thread.start()
    argv = ["--mode", "kstep", "--every", "7", "--epochs", "2000", "--eval-every", "2000", "--checkpoint-every", "0"]
    argv += ["--stall-seconds", "3", "--output", "run", "--resume", "auto", "--collectives", "window"]
    said = hung(run, argv, [[0, True, 100, "pid"]], 3)
    thread.join()
    place = re.search(missing(0, r".*step (?P<step>\d+)"), said)
    assert place is not None and "stopped by a signal" in said and re.search(r"by rank [12]\)", said)
    epochs = str(int(place["step"]) // 15 + 2)
    done = run.cli([*TRAIN, *argv, "--epochs", epochs], 3)
    assert re.search("saved by rank [12] of 3", done.stderr)
    result = result_of(done.stdout)
    # A local step that was made but not yet counted is made again.
    assert 0 <= result["updates"] - int(epochs) * 15 * 3 <= 3 and result["test_accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the watch itself is the same
def test_a_slow_rank_and_a_suspended_job_are_not_accused(run: MpiRun) -> None:
    """The first step takes longer than the limit; later steps, added up, too; then all ranks are stopped for longer."""
    plan: list[list[Any]] = [[1, True, 1, 6.0], *([1, True, call, 1.2] for call in (10, 12, 14))]
    plan += [[rank, True, 40, "pid"] for rank in (0, 1)]
    paths = [run.folder / f"pid-{rank}" for rank in (0, 1)]
    thread = threading.Thread(target=_stop, args=(*paths,), kwargs={"seconds": 6}, daemon=True)
    thread.start()
    argv = ["--mode", "sync", "--epochs", "30", "--eval-every", "30", "--checkpoint-every", "0", "--stall-seconds", "4"]
    done = run.cli([*TRAIN, *argv, "--output", "run"], 2, env={"PLAN": json.dumps(plan)}, timeout=300)
    thread.join()
    assert "stalled" not in done.stderr and result_of(done.stdout)["updates"] == 30 * 23


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize("backend", ["torch", "horovod"])
def test_the_other_backends(run: MpiRun, lane: Lane, backend: str) -> None:
    need(backend, lane)
    argv = ["--mode", "sync", "--epochs", "2", "--collectives", backend, "--stall-seconds", "3", "--output", "run"]
    said = hung(run, argv, [[1, True, 9, "stop"]], 2)
    assert "rank 1 has not come to the average of the gradients of step 9, where rank 0 waited" in said
    assert "stopped by a signal" in said and newest(run.folder / "run").exists()


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_rank_that_hangs_in_the_evaluation(run: MpiRun) -> None:
    argv = ["--mode", "kstep", "--epochs", "2", "--stall-seconds", "3", "--output", "run", "--resume", "auto"]
    said = hung(run, argv, [[1, False, EVALUATION, "stop"]], 2)
    assert "rank 1 has not come to evaluation after step 23" in said and "in evaluation after step 23" in said
    result = result_of(run.cli([*TRAIN, *argv], 2).stdout)
    assert result["updates"] == 2 * 23 * 2
    with h5py.File(run.folder / "run" / "run.h5") as file:
        assert file["ranks/samples"][:].sum() == 2 * 1438 and list(file["curves/epoch"]) == [1, 2]


def test_a_rank_of_another_node(two_hosts: HostsRun) -> None:
    folder = two_hosts.folder  # the pause: steps are quicker than datagrams
    (folder / "mynet.py").write_text(MODEL)
    argv = ["--mode", "sync", "--epochs", "2", "--stall-seconds", "3", "--output", str(folder / "run")]
    said = hung(two_hosts, argv, [[2, True, 4, 1.5], [2, True, 9, "stop"]], 4, PYTHONPATH=f"{REPO}:{folder}")
    assert re.search(missing(2, "the average of the gradients of step 9"), said)
    # Who speaks first, and whether the others had waited before the stop.
    assert re.search(r"rank 2 \(process \d+ on n2\): (no sign of life from there|heard of last|stopped by a signal)", said)
    assert newest(folder / "run").exists()


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_rank_of_another_node_whose_answer_is_missing(two_hosts: HostsRun) -> None:
    folder = two_hosts.folder
    (folder / "mynet.py").write_text(MODEL)
    argv = ["--mode", "async", "--epochs", "2", "--stall-seconds", "6", "--output", str(folder / "run")]
    said = hung(two_hosts, argv, [[2, True, 4, 0.7], [2, True, 9, "stop"]], 4, PYTHONPATH=f"{REPO}:{folder}")
    # Who speaks first: a rank of the other node, or the one beside it; they may have waited since long before the stop.
    assert re.search(r"rank 2 \(process \d+ on n2\): (no sign of life from there|heard of last|stopped by a signal)", said)
    assert "No checkpoint has been made yet" in said


def _stop(*paths: Path, seconds: float | None = None) -> None:
    """Stop the processes whose numbers these files hold, as soon as they are there; let them go on after so many seconds."""
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
    pids = [int(path.read_text()) for path in paths]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if seconds is not None:
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
