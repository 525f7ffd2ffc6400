"""The processes of one job, found by a word in their environment, and the shared-memory files that they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hpcasync.proc import PARENT, process_stat, started

TOKEN = "HPCASYNC_LAUNCH"
SHARED = Path("/dev/shm")


def processes(token: str) -> list[int]:
    """The living processes with this word; ranks leave their launcher's process group."""
    wanted, found = f"{TOKEN}={token}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended, or it is not ours
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def ranks(token: str) -> list[int]:
    """Those that are ranks: they have a rank's number, are no shell, and no children of a rank."""
    found = {pid for pid in processes(token) if _rank(pid)}
    return sorted(pid for pid in found if _parent(pid) not in found)


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal; a process that has gone is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end(token: str) -> None:
    """Kill all processes of a job."""
    for _ in range(100):
        left = processes(token)
        if not left:
            return
        send(left, signal.SIGKILL)
        os.sched_yield()


def segments(pids: Iterable[int]) -> set[str]:
    """The files in /dev/shm that these processes map."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {line.split(maxsplit=5)[5] for line in lines if f" {SHARED}/" in line and not line.endswith(" (deleted)")}
    return found


class Ledger:
    """Which segments the jobs of this user's launchers have had: a launcher that was killed itself leaves its page.

    Args:
        folder: of the pages, one per launcher; by default one per user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"hpcasync-launch-{os.getuid()}"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._page = self._folder / f"{os.getpid()}-{started(os.getpid())}.json"
        self._known: set[str] = set()

    def note(self, found: set[str]) -> None:
        """These belong to this launcher's job."""
        if found <= self._known:
            return
        self._known |= found
        with contextlib.suppress(OSError):  # no room: this launcher knows them all the same
            self._page.with_suffix(".tmp").write_text(json.dumps(sorted(self._known)))
            self._page.with_suffix(".tmp").rename(self._page)  # a launcher that is killed leaves a whole page

    def clear(self) -> list[str]:
        """Remove what this launcher's job has left, and what those of dead launchers have; returns what was removed."""
        removed = []
        pages = [page for page in self._folder.glob("*.json") if page != self._page and not _alive(page.stem)]
        pages += [self._page] if self._known else []
        mapped = segments(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()) if pages else set()
        for page in pages:
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # a damaged page is removed, too
                for name in self._known if page == self._page else json.loads(page.read_text()):
                    path = Path(name)
                    if path.parent == SHARED and name not in mapped and path.exists() and path.stat().st_uid == os.getuid():
                        path.unlink()
                        removed.append(name)
            page.unlink(missing_ok=True)
        for begun in self._folder.glob("*.tmp"):
            if begun.stem == self._page.stem or not _alive(begun.stem):
                begun.unlink(missing_ok=True)
        self._known = set()
        return removed


def _rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes()
        shell = Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "dash", "bash")
        return not shell and (b"\0PMI_RANK=" in variables or b"\0OMPI_COMM_WORLD_RANK=" in variables)
    return False


def _parent(pid: int) -> int:
    fields = process_stat(pid)
    return int(fields[PARENT]) if fields else 0


def _alive(stem: str) -> bool:
    pid, _, then = stem.partition("-")
    return pid.isdecimal() and started(int(pid)) == then != ""
