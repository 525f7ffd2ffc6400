"""One job from its start to its end, started again when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from hpcasync.errors import UsageError
from hpcasync.launch.library import Library
from hpcasync.launch.processes import SHARED, TOKEN, Ledger, end, processes, ranks, segments, send
from hpcasync.train.launched import FOLDER, RESTARTED, SURVIVE, TRAINING
from hpcasync.train.signals import EXIT_CODE

LOOK_SECONDS = 0.2
PER_RANK = 6 << 20
"""Bytes of /dev/shm that a rank needs before any window: MPICH 5.0.2 takes 5.2 MB for each, and dies with SIGBUS without."""


def check_shared_memory(count: int, folder: Path = SHARED) -> None:
    """Raise ``UsageError`` if MPI itself will not fit into shared memory; windows are checked when they are made."""
    if not folder.is_dir():
        return
    about: Any = os.statvfs(folder)
    free, need = about.f_bavail * about.f_frsize, count * PER_RANK
    if free < need:
        raise UsageError(
            f"{folder} has {free / 2**20:.0f} MiB free, {count} ranks need {need / 2**20:.0f} MiB before any window. Enlarge it "
            "(mount -o remount,size=..., docker run --shm-size=...) or remove stale files in it."
        )


class Job:
    """A program on several ranks.

    Args:
        library: that starts it.
        count: ranks.
        program: one rank's command.
        survive: ranks may die, all but rank 0.
    """

    def __init__(self, library: Library, count: int, program: list[str], survive: bool = False) -> None:
        self._library, self._count, self._program, self._survive = library, count, program, survive
        self._token, self._received, self._passed_on = "", 0, False

    @property
    def asked_to_stop(self) -> bool:
        """Whether this launcher got a signal to pass on."""
        return bool(self._received)

    def run(self) -> int:
        """Start it and wait for its end; signals go to the ranks. Returns its exit code, 128 + n for a signal n."""
        ledger = Ledger()
        ledger.clear()
        check_shared_memory(self._count)
        self._token = uuid.uuid4().hex
        before = {n: signal.signal(n, self._pass_on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        with tempfile.TemporaryDirectory(prefix="hpcasync-launch-") as folder:
            env = self._library.environment(self._count) | {TOKEN: self._token, FOLDER: folder}
            env |= {SURVIVE: "1"} if self._survive else {}
            process = subprocess.Popen(self._library.command(self._count, self._program, self._survive), env=env)
            try:
                return self._watch(process, Path(folder), ledger)
            finally:
                end(self._token)
                process.wait()
                ledger.clear()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _watch(self, process: subprocess.Popen[bytes], folder: Path, ledger: Ledger) -> int:
        looked = 0.0
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            if self._received and not self._passed_on:
                self._tell_ranks()
            if time.monotonic() - looked > 5 * LOOK_SECONDS:
                looked = time.monotonic()
                ledger.note(segments(processes(self._token)))
            died = _ended(folder) if self._survive else {}
            lost = [r for r, code in died.items() if code and (r == 0 or not (folder / TRAINING).exists())]
            if lost:  # the host of the window, or too early for the others to do without
                return died[lost[0]]
        code = process.returncode
        if self._survive and code in (0, 141, -signal.SIGPIPE):  # the wrappers' codes say nothing; mpiexec may end of SIGPIPE
            return _ended(folder).get(0, 1)
        return 128 - code if code < 0 else code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self._passed_on = False
        self._tell_ranks()

    def _tell_ranks(self) -> None:
        """Pass the signal on; again later if there are no ranks yet."""
        there = ranks(self._token)
        send(there, signal.SIGTERM if self._survive else self._received)
        self._passed_on = bool(there)


def run_with_restarts(job: Job, again: Job, restarts: int) -> int:
    """Run ``job``; when it dies, ``again``, at most so many times. Bad input and a stop on request are no death."""
    code = job.run()
    for attempt in range(1, restarts + 1):
        if code in (0, 2, EXIT_CODE) or job.asked_to_stop:
            return code
        print(
            f"hpcasync: the job died with exit code {code}; restart {attempt} of {restarts} from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        job = again
        os.environ[RESTARTED] = "1"
        code = job.run()
    return code


def _ended(folder: Path) -> dict[int, int]:
    """Exit codes of the ranks that have ended, as their wrappers wrote them."""
    return {int(p.name[5:]): int(p.read_text().split()[0]) for p in folder.glob("rank-*") if p.name[5:].isdigit()}
