"""``hpcasync doctor``: is this machine, and the way this job was started, fit for training?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="check MPI, nodes, memory, windows, backends; say what to do",
        description="Check what training needs, on the ranks that mpiexec or srun started. Exit code 1 if anything fails.",
    )
    parser.add_argument("--output", metavar="DIR", default=".", help="folder where runs will write (default: here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line per check as it is done, or one JSON object at the end."""
    from hpcasync.doctor import Line, examine, worst
    from hpcasync.errors import UsageError

    folder = Path(args.output)
    if not folder.is_dir():
        raise UsageError(f"--output {folder}: no such folder; expected where runs will write")
    told: list[Line] = []

    def tell(line: Line) -> None:
        told.append(line)
        if not args.json:
            print(f"{line.status:<5} {line.check}: {line.found}", flush=True)
            if line.remedy:
                print(f"      -> {line.remedy}", flush=True)

    def end() -> None:
        counts = {status: sum(line.status == status for line in told) for status in ("ok", "warn", "fail")}
        if args.json:
            lines = [dataclasses.asdict(line) for line in told]
            print(json.dumps({"status": worst(told), **counts, "lines": lines}), flush=True)
        else:
            print(", ".join(f"{n} {status}" for status, n in counts.items()), flush=True)

    lines = examine(folder, tell, end)
    if told:
        end()
    return int(worst(lines) == "fail")
