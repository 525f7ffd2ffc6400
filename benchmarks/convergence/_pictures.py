"""Pictures of the recipes: learning curves of a few cells, and accuracy against workers (or another x) of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

MOST_CURVES = 8  # cells; more are not legible in one picture
MOST_BELOW = 80  # points that a panel shows below its best


def curves(path: Path, table: Mapping[str, Mapping[str, tuple[float, Sequence[np.ndarray]]]]) -> None:
    """Test accuracy against epochs, a panel per cell: mean over the seeds, and a band of one standard deviation.

    Args:
        path: PNG to write; nothing is written without cells or with too many.
        table: cell -> method -> learning rate and per seed float (2, evaluations): epochs, accuracy in %.
    """
    from matplotlib.figure import Figure

    if not table or len(table) > MOST_CURVES:
        return
    across = 1 if len(table) == 1 else 2
    down = math.ceil(len(table) / across)
    figure = Figure(figsize=(7.5 * across, 4.2 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(table) :]:
        axis.set_axis_off()
    for axis, (cell, methods) in zip(axes, table.items(), strict=False):
        top = 0.0
        for name, (lr, seeds) in methods.items():
            points = min(c.shape[1] for c in seeds)
            x, y = seeds[0][0, :points], np.array([c[1, :points] for c in seeds])
            (line,) = axis.plot(x, y.mean(0), label=f"{name}, lr {lr:g}")
            axis.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=line.get_color(), alpha=0.15, linewidth=0)
            top = max(top, float(y.mean(0).max()))
        axis.set(title=cell, xlabel="epoch", ylabel="test accuracy, %", ylim=(max(0, top - 30), min(100, top + 3)))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def panels(
    path: Path,
    table: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    xlabel: str,
    ylabel: str = "final test accuracy, %",
    *,
    span: float | None = 12,
    log: bool = True,
) -> None:
    """A value against x, a panel per setting, a line per method with bars of one standard deviation over the seeds.

    Args:
        path: PNG to write; nothing is written without panels.
        table: panel -> method -> (x, mean, standard deviation).
        xlabel: of all panels.
        ylabel: of all panels.
        span: height of a panel below its best mean at least; None: all of it.
        log: whether x is logarithmic.
    """
    from matplotlib.figure import Figure

    if not table:
        return
    across = min(4, len(table))
    down = math.ceil(len(table) / across)
    figure = Figure(figsize=(4.2 * across, 3.4 * down + 0.6), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(table) :]:
        axis.set_axis_off()
    names = list(dict.fromkeys(m for methods in table.values() for m in methods))
    for axis, (panel, methods) in zip(axes, table.items(), strict=False):
        every = sorted({x for points in methods.values() for x, _, _ in points})
        for m, points in methods.items():
            x, mean, sd = np.array(sorted(points)).T
            nudge = 1 + 0.012 * (names.index(m) - len(names) / 2) if log else 1
            axis.errorbar(x * nudge, mean, sd, label=m, color=f"C{names.index(m) % 10}", marker="o", ms=3, lw=1.2, capsize=2)
        means = [mean for points in methods.values() for _, mean, _ in points]
        if log and every[0] > 0:
            axis.set_xscale("log")
        axis.set_xticks(every, [f"{x:g}" for x in every], minor=False)
        axis.minorticks_off()
        axis.set(title=panel, xlabel=xlabel, ylabel=ylabel)
        if span is not None:
            top = max(means)
            below = min(max(span, 1.05 * (top - min(means))), MOST_BELOW)
            axis.set_ylim(top - below, top + 0.15 * span)
        axis.grid(alpha=0.3)
    handles: dict[str, object] = {}
    for axis in axes[: len(table)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(2 * across, 5, len(handles)), fontsize="small"
    )
    figure.savefig(path, dpi=110)
