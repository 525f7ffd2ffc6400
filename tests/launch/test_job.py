"""`hpcasync launch` on the installed MPI: real jobs, killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcasync.errors import UsageError
from hpcasync.launch.job import check_shared_memory
from hpcasync.launch.processes import SHARED, Ledger
from tests.mpi import COMMON_ENV


def launch(*words: str | Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcasync", "launch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | COMMON_ENV)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0", "--", "true"], "-n 0: expected at least 1"),
        (["-n", "2"], "no command"),
        (["-n", "2", "--max-restarts", "-1", "--", "true"], "expected 0 or more"),
        (["-n", "2", "--max-restarts", "1", "--", "train"], "with --output"),
        (["-n", "2", "--min-ranks", "1", "--", "train"], "expected 1 to -n 2, and --max-restarts N"),
        (["-n", "2", "--min-ranks", "3", "--max-restarts", "1", "--", "train", "--output", "x"], "--min-ranks 3: expected 1 to"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str) -> None:
    done = launch(*words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


# Stays where the first checkpoint is made until the test takes the file "hold" away.
HELD = """
import time
from pathlib import Path
import torch

def net(shape, classes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))

    def wait(module, inputs):
        while Path("hold").exists() and list(Path("run").glob("checkpoint-*.h5")):
            time.sleep(0.01)

    model.register_forward_pre_hook(wait)
    return model
"""


def test_a_killed_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "hold").touch()
    train = ["train", "--model", "held:net", "--epochs", "4", "--checkpoint-every", "10", "--output", "run", "--threads", "1"]
    command = [sys.executable, "-m", "hpcasync", "launch", "-n", "2", "--max-restarts", "1", "--", *map(str, train), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | COMMON_ENV, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 60
        while not list(output.glob("checkpoint-*.h5")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(json.loads((output / "run.lock").read_text())["pid"], signal.SIGKILL)
        (tmp_path / "hold").unlink()
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
    assert process.returncode == 0, err
    assert "restart 1 of 1" in err
    result = json.loads(out.splitlines()[-1])
    assert result["restarts"] == 1 and result["resumed_from"]
    # Every step that the checkpoint knew is counted once.
    assert result["updates"] == 4 * 2 * 23


def test_exit_codes_are_those_of_the_program() -> None:
    assert launch("-n", "2", "--", "train", "--epochs", "0").returncode == 2
    assert launch("-n", "2", "--", sys.executable, "-c", "from mpi4py import MPI").returncode == 0


def test_only_segments_of_own_jobs_are_removed(tmp_path: Path) -> None:
    mine, other = SHARED / f"hpcasync-test-{os.getpid()}-mine", SHARED / f"hpcasync-test-{os.getpid()}-other"
    try:
        mine.write_bytes(b"x")
        other.write_bytes(b"x")
        (tmp_path / "999999999-1.json").write_text(json.dumps([str(mine), str(tmp_path / "kept")]))  # of a dead launcher
        (tmp_path / "kept").write_text("")
        assert Ledger(tmp_path).clear() == [str(mine)]
        assert not mine.exists() and other.exists() and (tmp_path / "kept").exists()
        assert list(tmp_path.glob("*.json")) == []
    finally:
        mine.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def test_too_little_shared_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="MiB free, 1000000000 ranks need"):
        check_shared_memory(1_000_000_000)
