"""A partition as a picture: how many samples of each class every worker holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcasync.data.partition_labels import Indices
from hpcasync.errors import UsageError

_COLOURS = 20  # of the map tab20: with more classes colours would repeat


def class_counts(parts: Sequence[Indices], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Samples per worker and class, ``(workers, classes)``."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def plot_partition(
    counts: NDArray[np.int64], out: str | os.PathLike[str], *, names: Sequence[str] = (), title: str = ""
) -> Path:
    """Draw ``counts`` and return the path: one stacked bar per worker, or a map of shades for more than 20 classes.

    Args:
        counts: samples ``(workers, classes)``.
        out: PNG, PDF or SVG.
        names: of the classes.
        title: of the picture.

    Raises:
        UsageError: matplotlib is not installed; a file that cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'hpcasync[plots]'") from error
    workers, classes = counts.shape
    figure = Figure(figsize=(9, float(np.clip(1.6 + 0.28 * workers, 3, 14))), layout="constrained")
    axes = figure.subplots()
    if classes <= _COLOURS:
        left = np.zeros(workers)
        # tab20 pairs a dark with a light shade; up to ten classes take the dark ones, which are easier to tell apart.
        colours = colormaps["tab10" if classes <= 10 else "tab20"]
        for k in range(classes):
            label = names[k] if names else str(k)
            bar = 1.0 if workers > 60 else 0.8  # thin bars with gaps would make stripes
            axes.barh(range(workers), counts[:, k], bar, left=left, color=colours(k), label=label)
            left += counts[:, k]
        axes.set(xlabel="samples", ylabel="worker", ylim=(workers - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        figure.legend(title="class", loc="outside right upper")
    else:
        image = axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(xlabel="class", ylabel="worker")
        figure.colorbar(image, label="samples")
    axes.set_title(title)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}; expected a file name that ends in .png, .pdf or .svg") from error
    return path
