"""``hpcasync demo``: the main job on the embedded data set, two ranks against one, a table and a picture."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError

_COMMON = ("--data", "digits", "--model", "mlp", "--batch", "16", "--epochs", "30")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("demo", help="Trend-Smooth asynchronous SGD on 2 ranks against sequential SGD, on digits")
    parser.add_argument("--output", metavar="DIR", help="folder (default: runs/<time>-demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start both runs as a user would, then compare them."""
    folder = Path(args.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-demo")
    runs = (
        ("sequential SGD", 1, ("--mode", "sync", "--rule", "plain", "--base", "sgd", "--lr", "0.1")),
        ("Trend-Smooth ASGD, 2 ranks", 2, ("--mode", "async", "--rule", "trend-smooth", "--base", "sgd", "--lr", "0.1")),
    )
    shown = []
    for label, ranks, flags in runs:
        out = folder / label.split(",")[0].lower().replace(" ", "-")
        command = [*_launcher(ranks), *_COMMON, *flags, "--seed", str(args.seed), "--output", str(out)]
        print(f"\n{label}\n$ {' '.join(command)}", flush=True)
        # The runs' own tables would repeat what is compared below; progress comes on the standard error.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env=_environment())
        if done.returncode:
            raise UsageError(f"the run '{label}' failed with exit code {done.returncode}; its messages are above")
        shown.append((label, out))
    _compare(shown, folder)
    return 0


def _compare(runs: list[tuple[str, Path]], folder: Path) -> None:
    from hpcasync.train.plot import plot_curves
    from hpcasync.train.records import read_ranks
    from hpcasync.train.table import console, ranks_table, runs_table

    out = console()
    out.print()
    out.print(runs_table([(label, json.loads((path / "result.json").read_text())) for label, path in runs]))
    for label, path in runs:
        out.print(ranks_table(read_ranks(path), title=label))
    picture = plot_curves(runs, folder / "curves.png")
    out.print(f"learning curves: {picture.resolve()}", soft_wrap=True)


def _launcher(ranks: int) -> list[str]:
    """How to start ``hpcasync train`` on so many ranks, with the mpiexec of this environment."""
    train = [sys.executable, "-m", "hpcasync", "train"]
    if ranks == 1:
        return train
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise UsageError(f"no mpiexec in {beside.parent} or on PATH: pip install 'hpcasync[mpich]'")
    return [mpiexec, "-n", str(ranks), *train]


def _environment() -> dict[str, str]:
    # One thread per rank for both runs: two ranks of two threads would fight for the cores of a small machine.
    return {**os.environ, "OMP_NUM_THREADS": "1"}
