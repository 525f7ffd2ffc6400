"""``hpcasync report``: runs explained on one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="runs explained on one HTML page",
        description="Write one self-contained HTML page about runs, live or simulated, finished or not, and its plots as PNGs. "
        "Runs that differ only in the seed become one line with a band.",
    )
    parser.add_argument("run_folders", metavar="RUN", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from hpcasync.report.page import write_report
    from hpcasync.report.run import read_run

    runs = [read_run(folder) for folder in args.run_folders]
    path = args.run_folders[0] / "report.html" if args.output is None else args.output
    drawn = write_report(runs, path)
    for one in runs:
        for sentence in one.missing:
            print(f"{one.folder}: {sentence}")
    print(f"{path}: " + (f"{len(drawn)} plots, each beside it as PNG too" if drawn else "no plots"))
    return 0
