"""Learning curves of runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpcasync.errors import UsageError
from hpcasync.train.step_log import unfinished


def read_curves(folder: Path) -> dict[str, np.ndarray]:
    """The curves of a finished run, from its ``run.h5``.

    Raises:
        UsageError: no such file, or not a run.
    """
    import h5py

    path = folder / "run.h5"
    with unfinished(path), h5py.File(path, "r") as file:
        return {name: values[:] for name, values in file["curves"].items()}


def plot_curves(runs: Sequence[tuple[str, Path]], out: Path) -> Path:
    """Draw test accuracy and training loss of runs against epochs and seconds, and return ``out``.

    Args:
        runs: label and folder of each run.
        out: a PNG.

    Raises:
        UsageError: matplotlib is not installed; a folder without a finished run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'hpcasync[plots]'") from error
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for label, folder in runs:
        curves = read_curves(folder)
        for column, x in enumerate(("epoch", "seconds")):
            axes[0, column].plot(curves[x], 100 * curves["test_accuracy"], marker=".", label=label)
            axes[1, column].plot(curves[x], curves["train_loss"], marker=".", label=label)
    for column, x in enumerate(("epoch", "training time, s")):
        axes[0, column].set(xlabel=x, ylabel="test accuracy, %")
        axes[1, column].set(xlabel=x, ylabel="training loss", yscale="log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(out, dpi=130)
    return out
