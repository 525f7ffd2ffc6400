"""One run at a time in a folder: a lock file that the holder keeps fresh, and that outlives no dead holder for long.

File locks of the system would be shorter, but many sites mount their parallel file systems without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError
from hpcasync.proc import started

REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A lock of another host that nobody has refreshed for so long belongs to a dead job."""


class RunLock:
    """Holds ``run.lock`` in a folder until ``release``.

    A lock is taken over when its holder is dead: its process has gone (same host), it was an earlier start of this same
    Slurm job, or it has not refreshed the file for a minute.

    Args:
        folder: of the run.

    Raises:
        UsageError: another run is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._me = {**_identity(), "token": uuid.uuid4().hex}
        self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``UsageError`` when another run has taken the lock over: this one was taken for dead."""
        if _read(self.path).get("token") != self._me["token"]:
            raise UsageError(
                f"{self.path} is no longer of this run: another one has taken the folder over while this one was stopped "
                "for long; nothing more is written there"
            )

    def release(self) -> None:
        """Give the folder free. Idempotent."""
        self._stop.set()
        if _read(self.path).get("token") == self._me["token"]:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _take(self) -> None:
        # A hard link appears at once and with its content, on network file systems too.
        mine = self.path.with_name(f".run.lock.{self._me['token']}.tmp")
        try:
            mine.write_text(json.dumps(self._me), encoding="utf-8")
            for _ in range(3):
                try:
                    os.link(mine, self.path)
                    return
                except FileExistsError:
                    self._remove_if_stale(mine)
        except OSError as error:
            raise UsageError(f"can't write {self.path}: {error.strerror}; give another folder with --output") from error
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
        raise UsageError(f"{self.path}: other runs take this folder at the same time; start one at a time")

    def _remove_if_stale(self, mine: Path) -> None:
        try:
            # Ages by the file system's own clock: hosts' clocks differ.
            age = mine.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return  # released just now
        holder = _read(self.path)
        if not _dead(holder, age, self._me):
            raise UsageError(
                f"a run is at work in {self.path.parent}: process {holder.get('pid')} on {holder.get('host')}"
                + (f", Slurm job {holder['job']}" if holder.get("job") else "")
                + f", since {holder.get('since')}. Give another folder with --output, or wait until it has ended. If it is "
                f"dead, remove {self.path}, or start again in {STALE_SECONDS:.0f} s."
            )
        # Of several that find it stale only one can rename this very file; should another have been quicker and hold it
        # anew, its lock is put back.
        aside = self.path.with_name(f".run.lock.{self._me['token']}.stale")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _read(aside) != holder:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if _read(self.path).get("token") == self._me["token"]:
                    os.utime(self.path)


def holder_of(folder: Path) -> str | None:
    """Who is at work in the folder of a run, None for nobody; only looks."""
    path = folder / "run.lock"
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return None
    holder = _read(path)
    if not holder or _dead(holder, age, _identity()):
        return None
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pid": pid,
        "started": started(pid),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _dead(holder: dict[str, Any], age: float, me: dict[str, Any]) -> bool:
    if age > STALE_SECONDS:
        return True
    if holder.get("job") and holder["job"] == me["job"] and holder.get("restart") != me["restart"]:
        return True  # Slurm starts a job again only when all of it has ended
    if holder.get("host") == me["host"] and holder.get("boot") == me["boot"] and _sees_processes():
        pid = holder.get("pid")
        return not isinstance(pid, int) or started(pid) != holder.get("started")
    return False


def _sees_processes() -> bool:
    return Path("/proc/self/stat").exists()


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
