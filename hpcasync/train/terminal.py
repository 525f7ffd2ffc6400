"""The terminal that a run was started from, also where a rank's standard error is a pipe to mpiexec."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple, TextIO

from hpcasync.proc import FOREGROUND, GROUP, PARENT, TERMINAL, process_stat

LAUNCHERS = ("mpiexec", "mpirun", "prterun", "orterun")


class Terminal(NamedTuple):
    """A terminal open for writing, and the process whose standard error it is."""

    descriptor: int
    owner: int


def find_terminal(stream: TextIO) -> Terminal | None:
    """The terminal of ``stream``, else the one that the standard error of this rank's mpiexec is; None where there is none.

    On another machine than mpiexec's there is none.
    """
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        own = stream.fileno()
    except (OSError, ValueError):  # a stream of a notebook or a test
        return None
    if os.isatty(own):
        return _open(f"/proc/self/fd/{own}", os.getpid())
    launcher = _launcher()
    if not launcher:
        return None
    fields = process_stat(launcher)
    # One that `hpcasync launch` has started is in a session without a terminal: then its parent owns it.
    alone = len(fields) > TERMINAL and fields[TERMINAL] == "0"
    return _open(f"/proc/{launcher}/fd/2", int(fields[PARENT]) if alone else launcher)


def shows(stream: TextIO) -> bool:
    """Whether a terminal shows what is written to ``stream``, a standard output.

    Open MPI gives ranks a pseudo-terminal of its own, also where its output goes to a file: that of this rank's mpiexec counts.
    On another machine than mpiexec's the stream itself does.
    """
    if not stream.isatty():
        return False
    launcher = _launcher()
    found = _open(f"/proc/{launcher}/fd/1", launcher) if launcher else None
    if found is not None:
        os.close(found.descriptor)
    return not launcher or found is not None


def in_foreground(pid: int) -> bool:
    """Whether a process may draw: not while it is stopped or in the background of its terminal."""
    fields = process_stat(pid)
    if len(fields) <= FOREGROUND:
        return True
    group, terminal, foreground = fields[GROUP], fields[TERMINAL], fields[FOREGROUND]
    return terminal == "0" or foreground in (group, "-1", "0")


def _open(path: str, owner: int) -> Terminal | None:
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):
            return None
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.isatty(descriptor):
        return Terminal(descriptor, owner)
    os.close(descriptor)
    return None


def _launcher() -> int:
    """The process id of the mpiexec above this rank, 0 where none is found."""
    pid = os.getppid()
    while pid > 1:
        try:
            name = Path(f"/proc/{pid}/comm").read_text()
        except OSError:
            return 0
        if name.startswith(LAUNCHERS):
            return pid
        fields = process_stat(pid)
        pid = int(fields[PARENT]) if fields else 0
    return 0
