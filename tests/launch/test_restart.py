"""The hosting rank dies: the job starts again from its last checkpoint, and no more is lost than ``--checkpoint-every``."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.cli.test_train import result_of
from tests.mpi import MpiRun, processes_of

# A user's model that notes how many training steps this rank has begun, and its process.
MODEL = """
import os, torch, hpcasync

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
        self.file = os.open(f"steps-{hpcasync.init().rank}-{os.getpid()}", os.O_CREAT | os.O_RDWR)
        self.steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            os.pwrite(self.file, b"%12d" % self.steps, 0)
        return self.body(x)

def net(shape, classes):
    return Net(classes)
"""
EVERY, EPOCHS, STEPS = 20, 40, 23
pytestmark = pytest.mark.timeout(600)  # two starts on a machine that may be busy


@pytest.mark.parametrize("mode", ["async", "sync", "kstep"])
def test_no_more_is_lost_than_since_the_last_checkpoint(mpirun: MpiRun, mode: str) -> None:
    (mpirun.folder / "mynet.py").write_text(MODEL)
    killed: list[int] = []
    thread = threading.Thread(target=_kill, args=(mpirun.folder, 0, killed), daemon=True)
    thread.start()
    train = ["train", "--model", "mynet:net", "--mode", mode, "--epochs", EPOCHS, "--eval-every", EPOCHS, "--json"]
    where = {"output": "run", "checkpoint_every": EVERY}
    (mpirun.folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in where.items()))
    argv = ["launch", "-n", 2, "--max-restarts", 1, "--", *train, "--config", "run.toml"]
    done = mpirun.cli([str(word) for word in argv], None, timeout=400)
    thread.join()
    assert len(killed) == 1 and "restart 1 of 1" in done.stderr and processes_of(mpirun.last_token) == []
    found = re.search(r"resumed from run/checkpoint-\d+\.h5: epoch (\d+), step (\d+)", done.stderr)
    assert found is not None, done.stderr
    saved = (int(found[1]) - 1) * STEPS + int(found[2])
    begun = int((mpirun.folder / f"steps-0-{killed[0]}").read_text())
    assert 0 <= begun - saved <= EVERY + 1  # the step under way is counted as begun
    result = result_of(done.stdout)
    assert result["restarts"] == 1 and result["updates"] == EPOCHS * STEPS * (1 if mode == "sync" else 2)


def test_the_lost_rank_is_left_out(mpirun: MpiRun) -> None:
    (mpirun.folder / "mynet.py").write_text(MODEL)
    killed: list[int] = []
    thread = threading.Thread(target=_kill, args=(mpirun.folder, 1, killed), daemon=True)
    thread.start()
    train = ["train", "--model", "mynet:net", "--mode", "sync", "--epochs", EPOCHS, "--eval-every", EPOCHS, "--json"]
    words = ["-n", 3, "--max-restarts", 1, "--min-ranks", 2]
    argv = ["launch", *words, "--", *train, "--output", "run", "--checkpoint-every", EVERY]
    done = mpirun.cli([str(word) for word in argv], None, timeout=400)
    thread.join()
    assert "of rank 1 (killed by signal 9 at " in done.stderr and "with 2 of 3 ranks" in done.stderr
    assert "made by 3 ranks, now 2. Reset: " in done.stderr
    result = result_of(done.stdout)
    assert result["restarts"] == 1 and result["ranks"] == 2 and result["epochs"] == EPOCHS
    assert [(death["rank"], death["cause"]) for death in result["deaths"]] == [(1, "killed by signal 9")]
    assert "rank 1 died at " in done.stdout


def _kill(folder: Path, rank: int, killed: list[int]) -> None:
    """Kill a rank as soon as it has made some 50 steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in folder.glob(f"steps-{rank}-*"):
            if int(path.read_text() or 0) >= 50:
                killed.append(int(path.name.split("-")[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
        time.sleep(0.005)
