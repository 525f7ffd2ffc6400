"""The plots of a report, as SVG without colours of its own for text and background: the page's style sets them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError
from hpcasync.modes.recorder import Event
from hpcasync.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#123456"  # a colour of no plot; becomes the page's text colour
SHARES = {"compute": "#4c78a8", "communicate": "#f58518", "wait": "#bab0ac"}
WINDOW = 60
"""Updates in the picture of their order."""
AXES = {"updates": "updates", "epoch": "epochs", "seconds": "training time, s"}


@dataclass(frozen=True)
class Plot:
    """A figure with its file name, heading, and one sentence on how to read it."""

    name: str
    title: str
    note: str
    figure: Figure


def plots(groups: Sequence[tuple[str, list[Run]]]) -> list[Plot]:
    """All plots that the runs have the data for.

    Args:
        groups: label and runs; the runs of one group differ in the seed.

    Raises:
        UsageError: matplotlib is not installed.
    """
    found = []
    if any(len(run.curves["epoch"]) for _, runs in groups for run in runs):
        for column, title in (("test_accuracy", "Test accuracy"), ("train_loss", "Training loss"), ("test_loss", "Test loss")):
            found.append(_curves(groups, column, title))
        found.append(_throughput(groups))
    for label, runs in groups:
        of = f": {label}" if len(groups) > 1 else ""
        run = runs[0]  # of several seeds, the first
        stem = re.sub(r"\W+", "-", run.folder.resolve().name)
        if run.ranks:
            found.append(_bars(run, of, f"ranks-{stem}"))
            if run.ranks["staleness"].sum():
                found.append(_staleness(run, of, f"staleness-{stem}"))
        order = _order(run, of, f"order-{stem}") if run.records else None
        if order is not None:
            found.append(order)
    return found


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


def _figure(columns: int = 1, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("reports need matplotlib: pip install 'hpcasync[plots]'") from error
    figure = Figure(figsize=(4.4 * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _style(axis: Axes, **labels: Any) -> None:
    axis.set(**labels)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, color=INK)
    axis.tick_params(colors=INK)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    for side, spine in axis.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"))


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)


def _curves(groups: Sequence[tuple[str, list[Run]]], column: str, title: str) -> Plot:
    figure, axes = _figure(3)
    scale = 100 if column == "test_accuracy" else 1
    for axis, (x, label_x) in zip(axes, AXES.items(), strict=True):
        for number, (label, runs) in enumerate(groups):
            _band(axis, [(r.curves[x], scale * r.curves[column]) for r in runs if len(r.curves[x])], label, f"C{number}")
        _style(axis, xlabel=label_x)
    axes[0].set_ylabel("%" if scale == 100 else "loss")
    if axes[0].get_legend_handles_labels()[0]:
        _legend(axes[0])
    return Plot(column, title, "Line: mean over seeds; band: lowest to highest seed.", figure)


def _band(axis: Axes, lines: list[tuple[np.ndarray, np.ndarray]], label: str, colour: str) -> None:
    """Mean and range of the lines where all of them have values, between their points by interpolation."""
    if not lines:
        return
    if len(lines) == 1:
        axis.plot(*lines[0], marker=".", color=colour, label=label)
        return
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        for x, y in lines:
            axis.plot(x, y, marker=".", color=colour)
        return
    values = np.stack([np.interp(grid, x, y) for x, y in lines])
    axis.plot(grid, values.mean(0), color=colour, label=f"{label} ({len(lines)} seeds)")
    axis.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.25, linewidth=0)


def _throughput(groups: Sequence[tuple[str, list[Run]]]) -> Plot:
    figure, (axis,) = _figure()
    for number, (label, runs) in enumerate(groups):
        lines = []
        for run in runs:
            seconds, updates = run.curves["seconds"], run.curves["updates"]
            spent = np.diff(seconds, prepend=0.0)
            lines.append((run.curves["epoch"][spent > 0], (np.diff(updates, prepend=0.0)[spent > 0] / spent[spent > 0])))
        _band(axis, [line for line in lines if len(line[0])], label, f"C{number}")
    _style(axis, xlabel="epochs", ylabel="updates per second")
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        _legend(axis)
    return Plot("throughput", "Throughput", "Updates of all ranks, per second of training between two evaluations.", figure)


def _bars(run: Run, of: str, name: str) -> Plot:
    ranks = len(run.ranks["seconds"])
    figure, (axis,) = _figure(height=1.4 + 0.25 * min(ranks, 40))
    left = np.zeros(ranks)
    for share, colour in SHARES.items():
        axis.barh(np.arange(ranks), run.ranks[share], left=left, color=colour, label=share)
        left += run.ranks[share]
    _style(axis, xlabel="seconds", ylabel="rank")
    axis.invert_yaxis()
    axis.locator_params(axis="y", integer=True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    return Plot(name, f"Where the time went{of}", "Per rank: computing gradients, communicating, waiting for others.", figure)


def _staleness(run: Run, of: str, name: str) -> Plot:
    figure, (axis,) = _figure()
    table = run.ranks["staleness"]
    table = table[:, : 1 + int(np.flatnonzero(table.sum(0))[-1])]
    for rank, counts in enumerate(table):
        if counts.sum():
            axis.step(np.arange(len(counts)), 100 * counts / counts.sum(), where="mid", label=f"rank {rank}")
    _style(axis, xlabel="staleness, updates", ylabel="% of the rank's updates")
    if len(table) <= 10:
        _legend(axis)
    return Plot(name, f"Staleness{of}", "Updates of others between a rank's read and its write.", figure)


def _order(run: Run, of: str, name: str) -> Plot | None:
    """Updates in the middle of the record, in the order of their times; None where the record has none."""
    times = [(r.events[r.events["kind"] == Event.PUSH]["end"] + r.facts["epoch_of_times"]) for r in run.records]
    every = np.sort(np.concatenate(times))
    if not len(every):
        return None
    middle = max(0, len(every) // 2 - WINDOW // 2)
    window = every[middle : middle + WINDOW]
    figure, (axis,) = _figure(height=1.2 + 0.25 * min(len(times), 40))
    for number, (record, own) in enumerate(zip(run.records, times, strict=True)):
        inside = own[(own >= window[0]) & (own <= window[-1])]
        axis.scatter(1e3 * (inside - window[0]), np.full(len(inside), record.rank), marker="|", s=90, color=f"C{number % 10}")
    _style(axis, xlabel="milliseconds", ylabel="rank")
    axis.set_yticks([r.rank for r in run.records] if len(times) <= 16 else [])
    axis.set_ylim(max(r.rank for r in run.records) + 0.5, -0.5)
    note = f"{len(window)} updates in the middle of the run, by the time at which each was done."
    return Plot(name, f"Order of updates{of}", note, figure)
