"""An uncaught exception on one rank ends the whole job: its traceback first, then MPI_Abort."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from hpcasync import launched
from hpcasync.comm.launch import launched_rank
from hpcasync.errors import UsageError

MEET_SECONDS = 3.0
"""How long a rank with bad input waits for the others to find the same."""

_comm: Any = None  # of our own, so that a failing rank's messages meet no other traffic
_meet: Callable[[], bool] | None = None  # in place of MPI's barrier
_exit_code = 0  # what this process is leaving with, once it has called sys.exit


def install(comm: Any) -> None:
    """Make uncaught exceptions, in any thread of this process, end the job with exit code 1, bad input with 2.

    So does ``sys.exit`` with an error on some ranks only. Without this the other ranks would wait in their next collective
    for ever.

    Args:
        comm: an mpi4py communicator whose job is to end.
    """
    global _comm
    _comm = comm.Dup()
    previous = sys.excepthook

    def main_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = previous
        if issubclass(kind, UsageError):
            _leave_together(usage_failed(f"{_place(trace)}hpcasync: error: {error}"))
        report(comm, kind, error, trace)
        abort(comm, 1)

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            report(comm, args.exc_type, args.exc_value, args.exc_traceback)
            abort(comm, 1)

    leave = sys.exit

    def remembering_exit(status: Any = None) -> NoReturn:
        global _exit_code
        _exit_code = status if isinstance(status, int) else int(status is not None)
        leave(status)

    sys.excepthook = main_hook
    threading.excepthook = thread_hook
    sys.exit = remembering_exit  # the only place where an exit code can be seen before the process is gone
    atexit.register(meet_or_abort)


def meet_by(meet: Callable[[], bool]) -> None:
    """For a job that outlives ranks, with which MPI has no barrier: ``meet`` waits for all to leave, False if they don't."""
    global _meet
    _meet = meet


def leaving_with(code: int) -> int:
    """Tell that the process is about to end with ``code``, and return it: ``sys.exit(main())`` has looked ``exit`` up before."""
    global _exit_code
    _exit_code = code
    return code


def exit_code() -> int:
    """What this process is leaving with."""
    return _exit_code


def leaving_in_error() -> bool:
    """Whether this process is on its way out with an error: no collective may be begun then."""
    return _exit_code != 0


def meet_or_abort() -> None:
    """On the way out with an error: end the job unless every rank is leaving too."""
    if leaving_in_error() and not _all_meet():
        abort(_comm, _exit_code)


def _all_meet() -> bool:
    """Whether every rank comes here within ``MEET_SECONDS``."""
    if _meet is not None:
        return _meet()
    everyone = _comm.Ibarrier()
    deadline = time.monotonic() + MEET_SECONDS
    while not everyone.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _leave_together(code: int) -> NoReturn:
    """End this process with ``code``, where every rank does: an excepthook itself can only end with 1."""
    from mpi4py import MPI

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    MPI.Finalize()
    os._exit(code)


def _place(trace: TracebackType | None) -> str:
    """Where in the user's script an error came from."""
    frames = traceback.extract_tb(trace)
    return f"{frames[0].filename}:{frames[0].lineno}: " if frames else ""


def usage_failed(message: str) -> int:
    """Say what is wrong with the input, once for the job, and return exit code 2.

    Where every rank found something wrong, rank 0 speaks and all leave in good order. Where only some did, the others
    are still working: those that failed speak, by rank, and the job ends.
    """
    if _comm is None:
        if launched_rank() == 0:
            print(message, file=sys.stderr, flush=True)
        return 2
    if not _all_meet():
        print(f"rank {_comm.rank}: {message}", file=sys.stderr, flush=True)
        abort(_comm, 2)
    if _comm.rank == 0:
        print(message, file=sys.stderr, flush=True)
    if _meet is not None:
        leaving_with(2)
    return 2


def report(
    comm: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback in one write, headed by the rank, so that ranks do not interleave."""
    text = "".join(traceback.format_exception(kind, error, trace))
    # A closed or broken stream must not keep the caller from ending the job.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        sys.stderr.write(f"hpcasync: rank {comm.rank} of {comm.size} failed; ending the job\n{text}")
        sys.stderr.flush()


def abort(comm: Any, code: int) -> NoReturn:
    """End the job on every rank with ``code``."""
    launched.note_abort(code)
    comm.Abort(code)
    raise SystemExit(code)  # not reached under MPI
