"""The summary tables of runs, for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from hpcasync.stats import Staleness, parts_of
from hpcasync.train.terminal import shows


def console(stream: TextIO | None = None) -> Console:
    """A console that wraps at the terminal's width, or at 110 columns and without colours where there is none."""
    out = sys.stdout if stream is None else stream
    shown = shows(out)
    return Console(file=out, force_terminal=None if shown else False, width=None if shown else 110, highlight=False)


def runs_table(results: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One row per run: accuracy, loss, speed, staleness, where the time went.

    Args:
        results: label and result object of each run.
    """
    table = Table(title="Runs")
    for name in ("run", "accuracy", "test loss", "train loss", "samples/s", "staleness 50 % / 95 %", "updates"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for label, r in results:
        stale = f"{r['staleness']['p50']:.0f} / {r['staleness']['p95']:.0f}"
        table.add_row(
            label,
            f"{100 * r['test_accuracy']:.2f} %",
            f"{r['test_loss']:.4f}",
            f"{r['train_loss']:.4f}",
            f"{r['samples_per_second']:,.0f}",
            stale,
            f"{r['updates']:,}",
        )
    return table


def ranks_table(ranks: Sequence[dict[str, Any]], title: str = "Ranks") -> Table:
    """One row per rank: samples, staleness, and the shares of compute, communicate and wait, of a GPU also copy."""
    table = Table(title=title)
    parts = parts_of(ranks)
    for name in ("rank", "samples", "staleness 50 %", "95 %", *parts, "skipped"):
        table.add_column(name, justify="right")
    for number, rank in enumerate(ranks):
        stale = Staleness(rank["staleness"]).summary()
        shares = [f"{100 * rank['share'].get(k, 0):.1f} %" for k in parts]
        cells = (f"{rank['samples']:,}", f"{stale['p50']:.0f}", f"{stale['p95']:.0f}", *shares, str(rank["skipped"]))
        table.add_row(str(rank.get("rank", number)), *cells)
    return table
