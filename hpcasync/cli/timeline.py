"""``hpcasync timeline``: a recorded run as a trace for Perfetto."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError

MANY = 500_000
"""Entries from which Perfetto becomes slow."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "timeline",
        help="a recorded run as a trace for Perfetto",
        description="Write what every rank of a run that was trained with --record did, and when, as Chrome-trace JSON: open it "
        "at ui.perfetto.dev or in chrome://tracing.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the trace (default: RUN/trace.json)")
    parser.add_argument("--steps", metavar="FIRST:LAST", help="only these steps of each rank")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the trace."""
    from hpcasync.replay.timeline import write_timeline
    from hpcasync.train.record_file import read_record

    steps = None
    if args.steps is not None:
        found = re.fullmatch(r"(\d+):(\d+)", args.steps)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"--steps {args.steps}: expected FIRST:LAST, such as 100:200; steps count from 1")
        steps = int(found[1]), int(found[2])
    path = args.run_folder / "trace.json" if args.output is None else args.output
    records = read_record(args.run_folder)
    longest = max(len(record.steps) for record in records)
    if steps is not None and steps[0] > longest:
        raise UsageError(f"--steps {args.steps}: no rank of {args.run_folder} made more than {longest} steps")
    count = write_timeline(records, path, steps)
    print(f"{path}: {count:,} entries; open it at https://ui.perfetto.dev")
    if count > MANY:
        print("That is much for a browser: --steps FIRST:LAST writes a part")
    return 0
