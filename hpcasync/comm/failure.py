"""An uncaught exception on one rank ends the whole job: its traceback first, then MPI_Abort."""

from __future__ import annotations

import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NoReturn


def install(comm: Any) -> None:
    """Make uncaught exceptions, in any thread of this process, end the job with exit code 1.

    Without this the other ranks would wait in their next collective for ever.

    Args:
        comm: an mpi4py communicator whose job is to end.
    """
    previous = sys.excepthook

    def main_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = previous
        report(comm, kind, error, trace)
        abort(comm, 1)

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            report(comm, args.exc_type, args.exc_value, args.exc_traceback)
            abort(comm, 1)

    sys.excepthook = main_hook
    threading.excepthook = thread_hook


def report(
    comm: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback in one write, headed by the rank, so that ranks do not interleave."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stdout.flush()
    sys.stderr.write(f"hpcasync: rank {comm.rank} of {comm.size} failed; ending the job\n{text}")
    sys.stderr.flush()


def abort(comm: Any, code: int) -> NoReturn:
    """End the job on every rank with ``code``."""
    comm.Abort(code)
    raise SystemExit(code)  # not reached under MPI
