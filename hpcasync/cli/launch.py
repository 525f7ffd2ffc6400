"""``hpcasync launch -n 4 -- train ...``: a job of several ranks on this machine, with the flags of the installed MPI."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError, unknown


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
    from hpcasync.launch.job import Job, leave, run_with_restarts
    from hpcasync.launch.library import find_library
    from hpcasync.launch.resume import Resume
    from hpcasync.launched import Death

    words = args.program[1:] if args.program[:1] == ["--"] else args.program
    if args.n < 1:
        raise UsageError(f"-n {args.n}: expected at least 1 rank")
    if args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if not words:
        raise UsageError("launch: no command; give one after --, such as: hpcasync launch -n 4 -- train --epochs 5")
    program = _program(words)
    resume = Resume(*_resumable(words)) if args.max_restarts else None
    if args.min_ranks is not None and not (args.max_restarts and 1 <= args.min_ranks <= args.n):
        raise UsageError(
            f"--min-ranks {args.min_ranks}: expected 1 to -n {args.n}, and --max-restarts N: it is for restarts"
        )
    if args.survive and words[0] != "train":
        raise UsageError(f"--survive is for `train`, whose ranks know how to go on; found {words[0]!r}")
    library = find_library()

    def start(count: int, deaths: list[Death] | None) -> Job:
        more = resume.flags() if resume is not None and deaths is not None else []
        return Job(library, count, program + more, args.survive, noted=bool(args.max_restarts), earlier=deaths)

    try:
        return run_with_restarts(start, args.n, args.n if args.min_ranks is None else args.min_ranks, args.max_restarts)
    except KeyboardInterrupt:
        print("hpcasync: interrupted; all ranks have been ended", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        leave()


def _program(words: list[str]) -> list[str]:
    from hpcasync.cli.parser import COMMANDS

    if words[0] in COMMANDS:
        return [sys.executable, "-m", "hpcasync", *words]
    if shutil.which(words[0]) is None:
        hint = "A program that is not on the PATH needs its path, a script `python` before it."
        raise unknown("command", words[0], COMMANDS, hint)
    return words


def _resumable(words: list[str]) -> tuple[Path, str | None]:
    """The folder that a run of `train` writes to, and what it is to go on from."""
    from hpcasync.cli.parser import make_parser
    from hpcasync.train.config import read_config

    keys = {}
    if words[0] == "train":
        given = vars(make_parser(words).parse_args(words))
        keys = (read_config(given["config"]) if given["config"] else {}) | given
    if "output" not in keys:
        raise UsageError("--max-restarts goes on from checkpoints: it needs `train` with --output DIR")
    return Path(str(keys["output"])), keys.get("resume")
