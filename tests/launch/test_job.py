"""`hpcasync launch` on the installed MPI: real jobs, killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from hpcasync.errors import UsageError
from hpcasync.launch.job import check_shared_memory
from hpcasync.launch.library import COMMON, FOLLOW, WRAPPER
from hpcasync.launch.processes import SHARED, Ledger
from hpcasync.launch.resume import Resume
from hpcasync.proc import started
from tests.mpi import COMMON_ENV, LANES, TOKEN, processes_of, require_lane

pytestmark = pytest.mark.timeout(400)  # jobs on a machine that may be busy


def launch(*words: str | Path, tmp: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcasync", "launch", *map(str, words)]
    env = os.environ | COMMON_ENV | ({} if tmp is None else {"TMPDIR": str(tmp)})
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0", "--", "true"], "-n 0: expected at least 1"),
        (["-n", "2"], "no command"),
        (["-n", "2", "--max-restarts", "-1", "--", "true"], "expected 0 or more"),
        (["-n", "2", "--max-restarts", "1", "--", "train"], "with --output"),
        (["-n", "2", "--max-restarts", "1", "--", "doctor", "--output", "x"], "needs `train` with --output"),
        (["-n", "2", "--", "trian", "--epochs", "1"], "unknown command 'trian'; did you mean 'train'?"),
        (["-n", "100000000", "--", "true"], "MiB free, 100000000 ranks need"),
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
        deadline = time.monotonic() + 150
        while not list(output.glob("checkpoint-*.h5")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(json.loads((output / "run.lock").read_text())["pid"], signal.SIGKILL)
        (tmp_path / "hold").unlink()
        out, err = process.communicate(timeout=250)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    assert process.returncode == 0, err
    assert "restart 1 of 1" in err
    result = json.loads(out.splitlines()[-1])
    assert result["restarts"] == 1 and result["resumed_from"]
    # Every step that the checkpoint knew is counted once.
    assert result["updates"] == 4 * 2 * 23


def test_exit_codes_are_those_of_the_program() -> None:
    assert launch("-n", "2", "--", "train", "--epochs", "0").returncode == 2
    assert launch("-n", "2", "--", sys.executable, "-c", "from mpi4py import MPI").returncode == 0


def test_quiet_and_passive_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMON:
        monkeypatch.delitem(COMMON_ENV, name, raising=False)
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    program = f"import json, os; print(json.dumps({{k: os.environ[k] for k in {list(COMMON)}}}))"
    done = launch("-n", "1", "--", sys.executable, "-c", program)
    assert json.loads(done.stdout) == COMMON | {"GOMP_SPINCOUNT": "7"}


def test_segments_of_a_killed_launcher_are_removed_by_the_next(tmp_path: Path) -> None:
    """The launcher and its ranks are killed while the window is there."""
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "hold").touch()
    train = ["train", "--model", "held:net", "--checkpoint-every", "1", "--output", "run", "--threads", "1"]
    # A ledger of its own, which no other test's launcher clears.
    env, token = os.environ | COMMON_ENV | {"TMPDIR": str(tmp_path)}, uuid.uuid4().hex
    command = [sys.executable, "-m", "hpcasync", "launch", "-n", "2", "--", *train]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env | {TOKEN: token}, cwd=tmp_path
    )
    page = tmp_path / f"hpcasync-launch-{os.getuid()}" / f"{process.pid}-{started(process.pid)}.json"
    left: list[Path] = []
    try:
        deadline = time.monotonic() + 150
        while not (list(tmp_path.glob("run/checkpoint-*.h5")) and any(path.exists() for path in left)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
            left = [Path(name) for name in json.loads(page.read_text())] if page.exists() else []
    finally:
        process.kill()  # first, or it would clear up
        process.wait()
        for pid in processes_of(token):
            os.kill(pid, signal.SIGKILL)
    while processes_of(token):
        time.sleep(0.05)
    assert launch("-n", "1", "--", "true", tmp=tmp_path).returncode == 0
    assert not any(path.exists() for path in left) and not page.exists()


@pytest.mark.parametrize(("program", "code"), [("kill -9 $$", -9), ("kill -11 $$", -11), ("exit 3", 3), ("exit 147", 147)])
def test_the_shell_around_a_rank_ends_as_it_did(program: str, code: int, tmp_path: Path) -> None:
    """Hydra ends the job of a child that was killed; of one that exited with 137 it sometimes misses that."""
    env = os.environ | {"HPCASYNC_LAUNCH_FOLDER": str(tmp_path), "PMI_RANK": "1"}
    done = subprocess.run(["sh", "-c", WRAPPER + FOLLOW, "rank", "sh", "-c", program], env=env, capture_output=True, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "first").read_text() == f"1 {128 - code if code < 0 else code}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """By Ctrl-C or a terminal that is closed, which tell the launcher's whole group."""
    command = [sys.executable, "-m", "hpcasync", "launch", "-n", "2", "--", "sh", "-c", "echo up; sleep 1000"]
    token = uuid.uuid4().hex
    env = os.environ | COMMON_ENV | {TOKEN: token}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # these tests may run under nohup
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130 and "Traceback" not in err and "hpcasync: interrupted; all ranks have been ended" in err
    assert processes_of(token) == []


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("flags", [("--survive",), ("--max-restarts", "1")], ids=" ".join)
def test_a_stop_of_the_whole_group(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """By timeout or a batch system: the launcher passes it on, and no mpiexec ends the ranks before they have saved."""
    command = [require_lane(name).python, "-m", "hpcasync", "launch", "-n", "2", *flags, "--"]
    command += ["train", "--epochs", "100000", "--batch", "8", "--threads", "1", "--output", str(tmp_path / "run"), "--json"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | COMMON_ENV,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 150
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=250)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert process.returncode == 75 and "stopped by SIGTERM; checkpoint" in err


def test_what_a_restart_goes_on_from(tmp_path: Path) -> None:
    assert Resume(tmp_path, None).flags() == ["--resume", "auto"]
    (tmp_path / "checkpoint-000007.h5").touch()
    resume = Resume(tmp_path, "elsewhere")
    assert resume.flags() == []  # died before it had a checkpoint of its own
    (tmp_path / "checkpoint-000008.h5").touch()
    assert resume.flags() == ["--resume", "auto"]


def test_only_segments_of_own_jobs_are_removed(tmp_path: Path) -> None:
    mine, other = SHARED / f"hpcasync-test-{os.getpid()}-mine", SHARED / f"hpcasync-test-{os.getpid()}-other"
    try:
        mine.write_bytes(b"x")
        other.write_bytes(b"x")
        (tmp_path / "999999999-1.json").write_text(json.dumps([str(mine), str(tmp_path / "kept")]))  # of a dead launcher
        (tmp_path / "kept").write_text("")
        (tmp_path / "999999999-1.tmp").write_text("[")  # killed while it wrote
        assert Ledger(tmp_path).clear() == [str(mine)]
        assert not mine.exists() and other.exists() and (tmp_path / "kept").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    finally:
        mine.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def test_too_little_shared_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="MiB free, 1000000000 ranks need"):
        check_shared_memory(1_000_000_000)
