"""One job from its start to its end, started again when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hpcasync.errors import UsageError
from hpcasync.launch.library import Library
from hpcasync.launch.processes import SHARED, TOKEN, Ledger, end, processes, ranks, segments, send
from hpcasync.launched import FOLDER, RESTARTED, SURVIVE, TRAINING, Death, aborted_with, death, noted_deaths
from hpcasync.train.signals import EXIT_CODE

LOOK_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
AT_ONCE = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""These end the job without a checkpoint; the others are for the ranks."""
SPEAK_SECONDS = 10.0
"""So long rank 0 has to say what is wrong and to end, where another rank ends with an error before there is a run."""
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
        noted: find out whose death ends the job; always with ``survive``.
        earlier: who died in the starts before; None for a first start.

    Attributes:
        deaths: after its end, of the ranks that were killed or hung.
    """

    def __init__(
        self,
        library: Library,
        count: int,
        program: list[str],
        survive: bool = False,
        noted: bool = False,
        earlier: list[Death] | None = None,
    ) -> None:
        self._library, self._count, self._program = library, count, program
        self._survive, self._noted, self._earlier = survive, noted, earlier
        self._token, self._received, self._passed_on = "", 0, False
        self.deaths: list[Death] = []

    @property
    def asked_to_stop(self) -> bool:
        """Whether this launcher got a signal to pass on."""
        return bool(self._received)

    def listen(self) -> None:
        """From here on this launcher's signals are for the ranks of this job; `leave` ends that."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Start it and wait for its end. Returns its exit code, 128 + n for a signal n."""
        ledger = Ledger()
        ledger.clear()
        check_shared_memory(self._count)
        self._token = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="hpcasync-launch-") as folder:
            env = self._library.environment(self._count) | {TOKEN: self._token, FOLDER: folder}
            env |= {SURVIVE: "1"} if self._survive else {}
            env |= {RESTARTED: json.dumps(self._earlier)} if self._earlier is not None else {}
            command = self._library.command(self._count, self._program, self._survive, self._noted)
            # A session of its own: signals to the group of this launcher (Ctrl-C, timeout, batch systems) come here only.
            process = subprocess.Popen(command, env=env, start_new_session=True)
            try:
                code = self._watch(process, Path(folder), ledger)
                self.deaths = self._find_deaths(Path(folder))
                return code
            finally:
                end(self._token)
                process.wait()
                ledger.clear()

    def _watch(self, process: subprocess.Popen[bytes], folder: Path, ledger: Ledger) -> int:
        looked, first_lost = 0.0, 0.0
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
                first_lost = first_lost or time.monotonic()
                if died.get(0) or time.monotonic() - first_lost > SPEAK_SECONDS:
                    return died[min(lost)]
        code, aborted = process.returncode, aborted_with(folder)
        if aborted is not None:  # MPICH's mpiexec may tell the end of a rank that it has killed itself
            return aborted
        if self._survive and code in (0, 141, -signal.SIGPIPE):  # the wrappers' codes say nothing; mpiexec may end of SIGPIPE
            return _ended(folder).get(0, 1)
        first = _numbers(folder / "first")[1:]
        if code and first and first[0] > 128:  # mpiexec's own codes for that are of many kinds
            return first[0]
        return 128 - code if code < 0 else code

    def _find_deaths(self, folder: Path) -> list[Death]:
        found = {of["rank"]: of for of in noted_deaths(folder)}
        # Where the end of one ends all, only the first one was killed by somebody else; an abort kills all.
        pages = folder.glob("rank-*[0-9]") if self._survive else folder.glob("first")
        for page in pages if aborted_with(folder) is None else ():
            said = [int(page.name[5:]), *_numbers(page)] if self._survive else _numbers(page)
            rank, code = (said + [0, 0])[:2]
            if code > 128 and rank not in found:
                found[rank] = death(rank, page.stat().st_mtime, f"killed by signal {code - 128}")
        return sorted(found.values(), key=lambda of: of["time"])

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number in AT_ONCE:
            raise KeyboardInterrupt
        self._passed_on = False
        self._tell_ranks()

    def _tell_ranks(self) -> None:
        """Pass the signal on; again later if there are no ranks yet."""
        there = ranks(self._token)
        send(there, signal.SIGTERM if self._survive else self._received)
        self._passed_on = bool(there)


def run_with_restarts(start: Callable[[int, list[Death] | None], Job], count: int, least: int, restarts: int) -> int:
    """Run a job; when it dies, start it again, at most so many times. Bad input and a stop on request are no death.

    Args:
        start: makes the job for so many ranks; of the ranks that died in its starts before, None for the first.
        count: ranks of the first start.
        least: ranks that are killed or hang are left out of the next start, down to so many.
        restarts: at most.

    Returns:
        The exit code of the last one.
    """
    job, deaths = start(count, None), list[Death]()
    job.listen()
    code = job.run()
    for attempt in range(1, restarts + 1):
        if _ended_well(code) or job.asked_to_stop:
            return code
        deaths += job.deaths
        before, count = count, max(least, count - len(job.deaths))
        print(
            f"hpcasync: {_what_ended(code, job.deaths)}; restart {attempt} of {restarts} from the newest checkpoint"
            + (f", with {count} of {before} ranks" if count < before else ""),
            file=sys.stderr,
            flush=True,
        )
        ended, job = job, start(count, deaths)
        job.listen()
        if ended.asked_to_stop:  # just now
            return code
        code = job.run()
    if job.deaths and not _ended_well(code) and not job.asked_to_stop:
        print(f"hpcasync: {_what_ended(code, job.deaths)}", file=sys.stderr, flush=True)
    return code


def leave() -> None:
    """The job is over: a signal must not change the exit code of a launcher that has only to say it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # Python gives handlers of its own back to the system at its end


def _ended_well(code: int) -> bool:
    """Whether nobody died."""
    return code in (0, 2, EXIT_CODE)


def _what_ended(code: int, deaths: list[Death]) -> str:
    said = []
    for of in deaths:
        at = time.strftime("%H:%M:%S", time.localtime(of["time"]))
        said.append(f"rank {of['rank']} ({of.get('cause', 'died')} at {at})")
    return f"the job died with exit code {code}" + (f", of {', '.join(said)}" if said else "")


def _ended(folder: Path) -> dict[int, int]:
    """Exit codes of the ranks that have ended, as their wrappers wrote them."""
    return {int(p.name[5:]): (_numbers(p) or [1])[0] for p in folder.glob("rank-*") if p.name[5:].isdecimal()}


def _numbers(page: Path) -> list[int]:
    """What a wrapper wrote; nothing where the disk had no room for it."""
    with contextlib.suppress(OSError, ValueError):
        return [int(word) for word in page.read_text().split()]
    return []
