"""The plots of a report: learning curves, throughput, where the time went, staleness, order of updates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.report.draw import (
    COLOURS,
    INK,
    LINES,
    Group,
    Plot,
    at_evaluations,
    band,
    legend,
    new_figure,
    seconds_label,
    style,
    whole_ticks,
)  # fmt: skip
from hpcasync.report.inside import inside_plots
from hpcasync.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = {"compute": COLOURS[0], "communicate": COLOURS[1], "wait": COLOURS[-1], "copy": COLOURS[2]}
WINDOW = 60
"""Updates in the picture of their order."""
TAIL = 1.5
"""A histogram that is so many times as long as what 99 % of it need is cut there,"""
LEAST = 10
"""but not below so many entries."""
BARS = 40
"""Bars that have a height of their own; more get thinner."""


def plots(groups: Sequence[Group]) -> list[Plot]:
    """All plots that the runs have the data for.

    Raises:
        UsageError: matplotlib is not installed.
    """
    found = []
    if any(len(run.curves["epoch"]) for group in groups for run in group.runs):
        for column, title in (("test_accuracy", "Test accuracy"), ("train_loss", "Training loss"), ("test_loss", "Test loss")):
            found.append(_curves(groups, column, title))
        found.append(_throughput(groups))
    stems: list[str] = []
    for group in groups:
        of = f": {group.label}" if len(groups) > 1 else ""
        stem = re.sub(r"\W+", "-", group.runs[0].name)
        stem += f"-{len(stems)}" if stem in stems else ""
        stems.append(stem)
        found += [plot for plot in (_bars(group, of, stem), _staleness(group, of, stem), _order(group, of, stem)) if plot]
        found += inside_plots(group, of, stem)
    return found


def _label(group: Group) -> str:
    return f"{group.label} ({group.many})" if group.many else group.label


def _curves(groups: Sequence[Group], column: str, title: str) -> Plot:
    scale = 100 if column == "test_accuracy" else 1
    panels: dict[str, Figure] = {}
    axes = {"updates": "updates", "epoch": "epochs", "seconds": seconds_label(groups)}
    for x, label_x in axes.items():
        figure, axis = new_figure()
        for number, group in enumerate(groups):
            lines = [(at, scale * values) for at, values in at_evaluations(group.runs, x, column)]
            band(axis, lines, _label(group), COLOURS[number % LINES])
        style(axis, xlabel=label_x, ylabel="%" if scale == 100 else "loss")
        if x == "epoch":
            whole_ticks(axis)
        legend(axis)
        panels[x] = figure
    several = any(group.many for group in groups)
    note = "Line: mean at equal evaluations, of updates and seconds too; band: lowest to highest."
    return Plot(column, title, note if several else "A point per evaluation.", panels)


def _throughput(groups: Sequence[Group]) -> Plot:
    figure, axis = new_figure()
    for number, group in enumerate(groups):
        lines = []
        for run in group.runs:
            spent, done = (np.diff(run.curves[name], prepend=0.0) for name in ("seconds", "samples"))
            there = (spent > 0) & np.isfinite(done)
            lines.append((run.curves["epoch"][there], done[there] / spent[there]))
        band(axis, lines, _label(group), COLOURS[number % LINES])
    seconds = seconds_label(groups)
    style(axis, xlabel="epochs", ylabel="samples/s" if seconds == "seconds" else f"samples / ({seconds})")
    whole_ticks(axis)
    axis.set_ylim(bottom=0)
    legend(axis)
    return Plot("throughput", "Throughput", "Samples of all ranks per second of training, between two evaluations.", {"": figure})


def _with_ranks(group: Group, column: str) -> tuple[list[Run], str]:
    """The runs that have this column of the same ranks, those that have ended if any, and a sentence that says which they are."""
    runs = [run for run in group.runs if column in run.ranks]
    runs = [run for run in runs if run.result] or runs
    runs = [run for run in runs if np.array_equal(run.ranks["rank"], runs[0].ranks["rank"])]
    if len(group.runs) == 1:
        return runs, ""
    if len(runs) == 1:
        return runs, f" Of {runs[0].name}, the only one of {group.many} with these numbers."
    without = len(group.runs) - len(runs)
    return runs, f" Mean of {len(runs)} runs" + (f"; {without} that have not ended are left out." if without else ".")


def _bars(group: Group, of: str, stem: str) -> Plot | None:
    runs, which = _with_ranks(group, "compute")
    if not runs:
        return None
    ranks = runs[0].ranks["rank"]
    figure, axis = new_figure(height=1.4 + 0.25 * min(len(ranks), BARS))
    left, places = np.zeros(len(ranks)), np.arange(len(ranks))
    for share, colour in SHARES.items():
        if not all(share in run.ranks for run in runs):  # copy: only with models on GPUs
            continue
        values = np.stack([run.ranks[share] for run in runs])
        mean = values.mean(0)
        axis.barh(places, mean, left=left, color=colour, label=share)
        if len(runs) > 1 and len(ranks) <= BARS and values.any():
            ends = np.stack([mean - values.min(0), values.max(0) - mean]).clip(0)
            axis.errorbar(left + mean, places, xerr=ends, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        left = left + mean
    style(axis, xlabel=seconds_label([group]), ylabel="rank")
    some = places[:: -(-len(places) // BARS)]
    axis.set_yticks(some, ranks[some], fontsize=8)
    axis.invert_yaxis()
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=9
    )
    which += " Whiskers: lowest to highest." if len(runs) > 1 else ""
    note = f"Per rank: computing gradients, communicating, waiting for others.{which}"
    return Plot(f"ranks-{stem}", f"Where the time went{of}", note, {"": figure})


def _staleness(group: Group, of: str, stem: str) -> Plot | None:
    runs, which = _with_ranks(group, "staleness")
    runs = [run for run in runs if run.ranks["staleness"].sum()]
    if not runs:
        return None
    tables, ranks = [run.ranks["staleness"] for run in runs], runs[0].ranks["rank"]
    widest = 1 + max(int(np.flatnonzero(table.sum(0))[-1]) for table in tables)
    shares = np.zeros((len(tables), len(ranks), widest))  # runs, ranks, staleness
    for share, table in zip(shares, tables, strict=True):
        counts = table[:, :widest]
        share[:, : counts.shape[1]] = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    shown = _bulk(shares.sum((0, 1)))
    if shown < widest:
        which += f" Cut at {shown - 1}: 1 % of the updates or less are beyond, up to {widest - 1}."
    shares = shares[:, :, :shown]
    figure, axis = new_figure()
    if ranks.min() >= 0 and ranks.max() < LINES:  # a rank has its colour in all plots, also where others have died
        for i, rank in enumerate(ranks):
            _histogram(axis, shares[:, i], f"rank {rank}", COLOURS[int(rank)])
        which += " Band: lowest to highest." if len(runs) > 1 else ""
    else:
        _histogram(axis, shares.mean(0), "", COLOURS[0])
        which += f" Line: mean of {len(ranks)} ranks; band: lowest to highest rank."
    style(axis, xlabel="staleness, updates", ylabel="% of the rank's updates")
    whole_ticks(axis)
    axis.set_ylim(bottom=0)
    legend(axis, ncols=2)
    note = f"Updates of others between a rank's read and its write.{which}"
    return Plot(f"staleness-{stem}", f"Staleness{of}", note, {"": figure})


def _bulk(shares: np.ndarray) -> int:
    """How many entries of a histogram to show: all, but for a long tail that holds 1 % or less."""
    most = 1 + int(np.searchsorted(np.cumsum(shares), 0.99 * shares.sum()))
    return len(shares) if len(shares) <= max(TAIL * most, LEAST) else max(most + 1, LEAST)


def _histogram(axis: Axes, shares: np.ndarray, label: str, colour: str) -> None:
    """Mean and range of the rows."""
    x = np.arange(shares.shape[1])
    axis.step(x, shares.mean(0), where="mid", color=colour, label=label)
    if len(shares) > 1:
        axis.fill_between(x, shares.min(0), shares.max(0), step="mid", color=colour, alpha=0.25, linewidth=0)


def _order(group: Group, of: str, stem: str) -> Plot | None:
    """Updates in the middle of the first record, in the order of their times; None where no record has any."""
    for run in group.runs:
        times = [r.events[r.events["kind"] == Event.PUSH]["end"] + r.facts["epoch_of_times"] for r in run.records]
        every = np.sort(np.concatenate(times)) if times else np.empty(0)
        if len(every):
            break
    else:
        return None
    middle = max(0, len(every) // 2 - WINDOW // 2)
    window = every[middle : middle + WINDOW]
    ranks = [record.rank for record in run.records]
    figure, axis = new_figure(height=1.2 + 0.25 * min(len(times), BARS))
    for i, own in enumerate(times):
        inside = own[(own >= window[0]) & (own <= window[-1])]
        axis.scatter(1e3 * (inside - window[0]), np.full(len(inside), i), marker="|", s=90, color=COLOURS[ranks[i] % LINES])
    style(axis, xlabel="milliseconds", ylabel="rank")
    some = np.arange(len(ranks))[:: -(-len(ranks) // BARS)]
    axis.set_yticks(some, [str(ranks[i]) for i in some], fontsize=8)
    axis.set_ylim(len(ranks) - 0.5, -0.5)
    whose = f" of {run.name}" if group.many else ""
    note = f"{len(window)} updates in the middle of the run{whose}, by the time at which each was done."
    return Plot(f"order-{stem}", f"Order of updates{of}", note, {"": figure})
