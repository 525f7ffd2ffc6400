"""What all plots of a report share: figures without colours of their own for text and background, lines with bands."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError
from hpcasync.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#123456"  # a colour of no plot; becomes the page's text colour
COLOURS = (
    "#3b7dd8", "#d9622b", "#2e8b57", "#c2478f", "#8a6fd1", "#a07d1c", "#1a8fa0", "#c94f4f", "#6b8e23", "#7f7f7f",
)  # fmt: skip
"""Each has a contrast above 3 to the page's light and to its dark background (WCAG 2.1, 1.4.11)."""
LINES = len(COLOURS)
"""Lines in a plot at most."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    label: str
    runs: list[Run]

    @property
    def many(self) -> str:
        """How many runs, for legends and notes; empty for one."""
        if len(self.runs) == 1:
            return ""
        seeds = {run.config.get("seed") for run in self.runs}
        return f"{len(self.runs)} {'seeds' if len(seeds) == len(self.runs) else 'runs'}"


@dataclass(frozen=True)
class Plot:
    """Panels under one heading, each a figure of its own, so that a narrow page can put one below the other.

    Attributes:
        name: of its files.
        title: the heading.
        note: one or two sentences on how to read it.
        panels: figures by the ends of their files' names.
    """

    name: str
    title: str
    note: str
    panels: dict[str, Figure]


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an element for a page; ``prefix`` keeps its identifiers apart from those of others."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", drawn)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1), count=1)


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a picture on white."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def new_figure(height: float = 3.0) -> tuple[Figure, Axes]:
    """A figure as wide as a phone shows it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("reports need matplotlib: pip install 'hpcasync[plots]'") from error
    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.subplots()


def style(axis: Axes, **labels: Any) -> None:
    """Labels, and everything that is not data in the page's text colour."""
    axis.set(**labels)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, color=INK)
    axis.tick_params(which="both", colors=INK)
    for side, spine in axis.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"))
    for text in (axis.xaxis.label, axis.yaxis.label, axis.xaxis.get_offset_text(), axis.yaxis.get_offset_text()):
        text.set_color(INK)


def legend(axis: Axes, **where: Any) -> None:
    """A legend, if anything has a label."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, labelcolor=INK, fontsize=9, **where)


def band(axis: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], label: str, colour: str) -> None:
    """Mean and range of lines (x, y) where all of them have values, between their points by interpolation."""
    lines = [line for line in lines if len(line[0])]
    if not lines:
        return
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(lines) == 1 or not len(grid):
        for i, (x, y) in enumerate(lines):
            axis.plot(x, y, marker=".", color=colour, label="" if i else label)
        return
    values = np.stack([np.interp(grid, x, y) for x, y in lines])
    if len(grid) == 1:
        mean = values.mean(0)
        ends = np.stack([mean - values.min(0), values.max(0) - mean]).clip(0)
        axis.errorbar(grid, mean, yerr=ends, fmt=".", capsize=3, color=colour, label=label)
        return
    axis.plot(grid, values.mean(0), color=colour, label=label)
    axis.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.25, linewidth=0)


def at_evaluations(runs: Sequence[Run], x: str, y: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lines over one x: the mean of the runs' own, at the evaluations after epochs that all of them have.

    Runs differ in what they take for an epoch; short ones may be at no time under way together. Where no epoch has an
    evaluation of all, each line is over its own x.
    """
    runs = [run for run in runs if len(run.curves["epoch"])]
    every = [np.unique(run.curves["epoch"]) for run in runs]
    common = functools.reduce(np.intersect1d, every) if every else np.empty(0)
    if not len(common):
        return [(run.curves[x], run.curves[y]) for run in runs]
    at = [np.intersect1d(run.curves["epoch"], common, return_indices=True)[1] for run in runs]
    mean = np.mean([run.curves[x][i] for run, i in zip(runs, at, strict=True)], axis=0)
    return [(mean, run.curves[y][i]) for run, i in zip(runs, at, strict=True)]


def whole_ticks(axis: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    axis.locator_params(axis="x", integer=True)


def seconds_label(groups: Sequence[Group]) -> str:
    """What to call the seconds of these runs: those of a simulated run are virtual."""
    kinds = {run.simulated for group in groups for run in group.runs}
    if len(kinds) > 1:
        return "seconds, real or virtual"
    return "virtual seconds" if kinds == {True} else "seconds"
