"""The parser of all commands, quiet on every rank but the first."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from hpcasync.comm.launch import launched_rank


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` of which only rank 0 speaks: under mpiexec every rank parses the same line."""

    def error(self, message: str) -> NoReturn:
        if launched_rank() == 0:
            self.print_usage(sys.stderr)
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and launched_rank() == 0:
            super()._print_message(message, file)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each sets ``run`` to what it does."""
    from hpcasync import __version__
    from hpcasync.cli import bench, build_horovod, data, demo, simulate, submit, train
    from hpcasync.cli import list as listing

    parser = Parser(prog="hpcasync", description="Asynchronous, synchronous and K-step data-parallel training over MPI.")
    parser.add_argument("--version", action="version", version=f"hpcasync {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (train, submit, simulate, demo, data, listing, bench, build_horovod):
        module.add(commands)
    return parser
