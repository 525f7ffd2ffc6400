"""Draw the pictures of the documentation from runs of the simulator: ``python docs/pictures.py`` writes docs/pictures/*.svg."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from hpcasync.data import open_dataset
from hpcasync.models import build
from hpcasync.report.page import write_report
from hpcasync.report.run import read_run
from hpcasync.simulate.asynchronous import Asynchronous
from hpcasync.simulate.config import make_simulate_config
from hpcasync.simulate.run import simulate

OUT = Path(__file__).parent / "pictures"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def pushes(seconds: float) -> list[tuple[float, int, int, int, int]]:
    """(time, worker, shard, version read, version written) of the first seconds of three workers, one of them slow."""
    config = make_simulate_config(
        {"workers": 3, "slow": ("2:2.5",), "compute": "lognormal:1.0,0.15", "rule": "asgd", "model": "mlp", "epochs": 1}, {}
    )
    dataset = open_dataset(config.data)
    torch.manual_seed(0)
    run = Asynchronous(config, dataset, build(config.model, dataset.shape, dataset.classes))
    seen: list[tuple[float, int, int, int, int]] = []
    for worker in run.workers:
        worker.view.observer = lambda k, read, wrote, i=worker.index: seen.append((run.now, i, k, read, wrote))
    run.run()
    return [row for row in seen if row[0] <= seconds]


def window(path: Path) -> None:
    """Who wrote which version when, and what each had read."""
    rows = [row for row in pushes(9.0) if row[2] == 0]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    written = {0: 0.0} | {wrote: when for when, _, _, _, wrote in rows}
    for when, worker, _, read, wrote in rows:
        arrow = {"arrowstyle": "->", "color": COLOURS[worker], "lw": 1.2}
        axes.annotate("", (when, wrote), (written[read], read), arrowprops=arrow)
        axes.plot(when, wrote, "o", color=COLOURS[worker])
        beside = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 8, "color": "#555555"}
        axes.annotate(f"{wrote - 1 - read}", (when, wrote), **beside)
    for worker in range(3):
        axes.plot([], [], "o-", color=COLOURS[worker], label=f"rank {worker}" + (", slow" if worker == 2 else ""))
    axes.set(xlabel="seconds", ylabel="version of a shard")
    axes.set_title("Arrows: from the version read to the version written; numbers: staleness", fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


REPORTED = {
    "trend-smooth": {"rule": "trend-smooth", "lr": 0.1},
    "gsgm": {"rule": "gsgm"},
    "guided": {"rule": "asgd", "guided": True},
    "kstep": {"mode": "kstep", "every": 4, "block_momentum": 0.9},
}
"""Simulated runs whose reports are shown, by folder."""


def report(folder: Path) -> None:
    """Plots of a report of five epochs on digits, one worker of four half as fast; trend-smooth with three seeds."""
    runs = []
    for name, keys in REPORTED.items():
        for seed in range(3 if name == "trend-smooth" else 1):
            where = Path(folder, name + (f"-{seed}" if seed else ""))
            common = {"workers": 4, "slow": ("3:2",), "compute": "lognormal:1.0,0.3", "epochs": 5, "eval_every": 1}
            simulate(make_simulate_config(common | keys | {"seed": seed, "output": str(where)}, {}), shown=False)
            runs.append(read_run(where))
    shown = {
        "test_accuracy": "seconds",
        "ranks-trend-smooth": "",
        "staleness-trend-smooth": "",
        "shrink_share-trend-smooth": "",
        "out_of_turn-gsgm": "",
        "scores-guided": "",
        "block_momentum-kstep": "",
    }
    for plot in write_report(runs, folder / "report.html"):
        if plot.name in shown:
            plot.panels[shown[plot.name]].savefig(OUT / f"report-{plot.name}.svg", facecolor="white")


def main() -> None:
    """All pictures."""
    matplotlib.rcParams["svg.hashsalt"] = "hpcasync"
    OUT.mkdir(exist_ok=True)
    window(OUT / "window.svg")
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder))


if __name__ == "__main__":
    main()
