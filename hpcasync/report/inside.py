"""Plots of what happened inside a method: one line per layer or rank, or a map where there are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpcasync.report.draw import COLOURS, INK, LINES, Group, Plot, band, legend, new_figure, style, whole_ticks
from hpcasync.report.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 60
"""Rows of a map that have a height of their own; more get thinner."""

# By the names of ``INSIDE``: heading, axis, factor, note.
_PLOTS = {
    "shrink_share": (
        "Shrink share",
        "% of the step taken away",
        100,
        "Per parameter: the part of the base's step, by its L1 length, that trend-smooth took from the last gradient of rank 0 "
        "before an evaluation.",
    ),
    "out_of_turn": (
        "Held gradients",
        "gradients",
        1,
        "Per rank, since the evaluation before: gradients that came out of turn and were held until it (or discarded).",
    ),
    "scores": (
        "Scores of remembered batches",
        "score psi",
        1,
        "Median, middle half, and lowest to highest of all ranks since the evaluation before. A batch above 0 agrees with the "
        "verification loss; the best are replayed.",
    ),
    "block_momentum": ("Block momentum", "norm", 1, "Per parameter: Euclidean norm after the last average."),
}


def inside_plots(group: Group, of: str, stem: str) -> list[Plot]:
    """The plots that the runs of a group have the numbers for.

    Args:
        group: of the runs.
        of: end of the headings.
        stem: end of the names.
    """
    found = []
    for name, (title, label, factor, note) in _PLOTS.items():
        runs = [run for run in group.runs if name in run.inside]
        if not runs:
            continue
        columns = runs[0].inside[name][0]
        runs = [run for run in runs if run.inside[name][0] == columns]
        if len(runs) > 1:
            bands = name != "scores" and len(columns) <= LINES
            note += f" Mean of {len(runs)} runs{'; band: lowest to highest' if bands else ''}."
        if name == "scores":
            figure = _quantiles(runs, label)
        elif len(columns) > LINES:
            figure = _map(runs, name, label, factor)
        else:
            figure = _lines(runs, name, label, factor)
        found.append(Plot(f"{name}-{stem}", f"{title}{of}", note, {"": figure}))
    return found


def _column(run: Run, name: str, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values, where there are any."""
    values = run.inside[name][1][:, i]
    there = np.isfinite(values)
    return run.curves["epoch"][there], values[there]


def _lines(runs: list[Run], name: str, label: str, factor: float) -> Figure:
    figure, axis = new_figure()
    for i, column in enumerate(runs[0].inside[name][0]):
        band(axis, [(x, factor * y) for x, y in (_column(run, name, i) for run in runs)], column, COLOURS[i])
    style(axis, xlabel="epochs", ylabel=label)
    whole_ticks(axis)
    axis.set_ylim(bottom=0)
    legend(axis, ncols=2)
    return figure


def _map(runs: list[Run], name: str, label: str, factor: float) -> Figure:
    """Epochs from left to right, columns from top to bottom."""
    epochs = runs[0].curves["epoch"]
    columns = runs[0].inside[name][0]
    tables = [run.inside[name][1] for run in runs if np.array_equal(run.curves["epoch"], epochs)]
    figure, axis = new_figure(height=1.2 + 0.15 * min(len(columns), ROWS))
    mesh = axis.pcolormesh(np.arange(len(epochs) + 1), np.arange(len(columns) + 1), factor * np.mean(tables, 0).T)
    style(axis, xlabel="epochs")
    axis.grid(False)
    every = -(-len(columns) // ROWS)
    axis.set_yticks(np.arange(len(columns))[::every] + 0.5, columns[::every], fontsize=8)
    some = np.unique(np.linspace(0, len(epochs) - 1, 6).astype(int))
    axis.set_xticks(some + 0.5, [f"{epochs[i]:g}" for i in some])
    axis.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axis, orientation="horizontal", location="top", aspect=40)
    bar.set_label(label, color=INK, fontsize=8)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _quantiles(runs: list[Run], label: str) -> Figure:
    figure, axis = new_figure()
    x = runs[0].curves["epoch"]
    tables = [run.inside["scores"][1] for run in runs if np.array_equal(run.curves["epoch"], x)]
    lowest, first, median, third, highest = np.mean(tables, 0).T
    axis.fill_between(x, lowest, highest, color=COLOURS[0], alpha=0.15, linewidth=0, label="all")
    axis.fill_between(x, first, third, color=COLOURS[0], alpha=0.35, linewidth=0, label="middle half")
    axis.plot(x, median, color=COLOURS[0], marker=".", label="median")
    axis.axhline(0, color=INK, linewidth=0.8)
    style(axis, xlabel="epochs", ylabel=label)
    whole_ticks(axis)
    legend(axis)
    return figure
