"""SIGUSR1 (time limit) and SIGTERM (preemption) become a wish to stop; installed before torch and MPI are imported.

Only the standard library here: those imports take seconds, in which either signal would end the process.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from hpcasync import launched

STOPPING = (signal.SIGUSR1, signal.SIGTERM)

EXIT_CODE = 75
"""``EX_TEMPFAIL``: stopped on request with a checkpoint; start again with ``--resume auto``."""

_received: list[str] = []
_installed = False


def install() -> None:
    """Note these signals from here on. Again after MPI is initialised: a library may have put its own handlers there."""
    global _installed
    if threading.current_thread() is threading.main_thread():
        _installed = True
        for number in STOPPING:
            # MPICH's launcher tells of a rank's death by SIGUSR1; `launch --survive` passes its own signals on as SIGTERM.
            told = number == signal.SIGUSR1 and launched.survives()
            signal.signal(number, signal.SIG_IGN if told else _note)


def installed() -> bool:
    """Whether this process has them: a script's own handlers are left alone."""
    return _installed


def received() -> str:
    """The name of the first of these signals that this process got, empty if none."""
    return _received[0] if _received else ""


def forget() -> None:
    """Forget signals received, for a process that runs several trainings."""
    _received.clear()


def _note(number: int, frame: FrameType | None) -> None:
    # Several come for one reason (the launcher forwards, Slurm sends too): a second one must not end the process.
    _received.append(signal.Signals(number).name)
