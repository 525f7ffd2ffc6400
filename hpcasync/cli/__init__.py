"""The command line: one module per command, errors and exit codes here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpcasync.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 2 for bad input, or 75 for a training that a signal has stopped after a checkpoint. A job that
        has stalled ends with 76. Any other error ends with its traceback (the whole job under MPI).
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        # Before torch and MPI are imported: until then a time limit's signal would end the process.
        from hpcasync.train import signals

        signals.install()
    from hpcasync.cli.parser import make_parser

    try:
        args = make_parser(argv).parse_args(argv)
        return _leaving_with(int(args.run(args) or 0))
    except UsageError as error:
        from hpcasync.comm.failure import usage_failed

        return usage_failed(f"hpcasync: error: {error}")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nobody is left to tell
        return 1


def _leaving_with(code: int) -> int:
    failure = sys.modules.get("hpcasync.comm.failure")  # torch and MPI are not loaded for this
    return code if failure is None else int(failure.leaving_with(code))


__all__ = ["main"]
