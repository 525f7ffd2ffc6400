"""The command line: one module per command, errors and exit codes here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpcasync.cli.parser import make_parser
from hpcasync.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 for bad input. Any other error ends with its traceback (the whole job under MPI).
    """
    try:
        args = make_parser().parse_args(argv)
        return int(args.run(args) or 0)
    except UsageError as error:
        from hpcasync.comm.failure import usage_failed

        return usage_failed(f"hpcasync: error: {error}")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nobody is left to tell
        return 1


__all__ = ["main"]
