"""The parser of all commands, quiet on every rank but the first."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` of which only rank 0 speaks: under mpiexec every rank parses the same line."""

    def error(self, message: str) -> NoReturn:
        if _speaks():
            self.print_usage(sys.stderr)
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and _speaks():
            super()._print_message(message, file)


def _speaks() -> bool:
    from hpcasync.comm.launch import launched_rank  # only here: the package brings torch along

    return launched_rank() == 0


COMMANDS = (
    "train", "launch", "submit", "simulate", "replay", "timeline", "report", "demo", "data", "list", "doctor",
    "bench", "build-horovod",
)  # fmt: skip
"""Each is a module here."""


def make_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser with all commands, or with the one that ``argv`` begins with; each sets ``run`` to what it does.

    Only the flags of ``train`` and ``simulate`` need torch: the other commands should not wait for it.
    """
    from hpcasync import __version__

    parser = Parser(prog="hpcasync", description="Asynchronous, synchronous and K-step data-parallel training over MPI.")
    parser.add_argument("--version", action="version", version=f"hpcasync {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        importlib.import_module(f"hpcasync.cli.{name.replace('-', '_')}").add(commands)
    return parser
