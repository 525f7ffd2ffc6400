"""``hpcasync launch -n 4 -- train ...``: a job of several ranks on this machine, with the flags of the installed MPI."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hpcasync.errors import UsageError


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "launch",
        help="start ranks on this machine, and again when they die",
        description="Start a command of hpcasync, or any program, on several ranks of this machine with the installed MPI.",
    )
    parser.add_argument("-n", type=int, required=True, metavar="RANKS", help="number of ranks")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="when the job dies, start it again with "
                        "--resume auto, at most N times (default: 0)")  # fmt: skip
    parser.add_argument("--min-ranks", type=int, metavar="M", help="with --max-restarts: start again without the ranks that were "
                        "killed or hung, but with at least M (default: with as many as before)")  # fmt: skip
    parser.add_argument("--survive", action="store_true", help="mode async: when a rank dies, all but rank 0, the others go on")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="such as: -- train --epochs 5")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the job; its exit code."""
    from hpcasync.launch.job import Job, run_with_restarts
    from hpcasync.launch.library import find_library
    from hpcasync.launched import Death

    words = args.program[1:] if args.program[:1] == ["--"] else args.program
    if args.n < 1:
        raise UsageError(f"-n {args.n}: expected at least 1 rank")
    if args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if not words:
        raise UsageError("launch: no command; give one after --, such as: hpcasync launch -n 4 -- train --epochs 5")
    given = {word.partition("=")[0] for word in words}
    if args.max_restarts and (words[0] != "train" or "--output" not in given):
        raise UsageError("--max-restarts goes on from checkpoints: it needs `train` with --output DIR")
    if args.min_ranks is not None and not (args.max_restarts and 1 <= args.min_ranks <= args.n):
        raise UsageError(
            f"--min-ranks {args.min_ranks}: expected 1 to -n {args.n}, and --max-restarts N: it is for restarts"
        )
    if args.survive and words[0] != "train":
        raise UsageError(f"--survive is for `train`, whose ranks know how to go on; found {words[0]!r}")
    library = find_library()
    resumed = words if "--resume" in given else [*words, "--resume", "auto"]

    def start(count: int, deaths: list[Death] | None) -> Job:
        program = _program(words if deaths is None else resumed)
        return Job(library, count, program, args.survive, noted=bool(args.max_restarts), earlier=deaths)

    return run_with_restarts(start, args.n, args.n if args.min_ranks is None else args.min_ranks, args.max_restarts)


def _program(words: list[str]) -> list[str]:
    from hpcasync.cli.parser import COMMANDS

    return [sys.executable, "-m", "hpcasync", *words] if words[0] in COMMANDS else words
