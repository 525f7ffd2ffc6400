"""What the convergence recipes share: a grid of learning rates, seeds in parallel, resumable runs, tables, claims.

A recipe is a list of cells (a setting: data, model, workers, base) with methods in it. Every method of a cell runs over the
cell's one grid of learning rates with the tuning seeds; its best rate, by mean final test accuracy, then runs with the final
seeds, which are others. Each run is kept as one JSON file named by a hash of its keys: a recipe that was stopped goes on where
it was. All runs are simulated (``hpcasync.simulate``): virtual workers, real gradients on real data.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
TUNING_SEEDS = (100,)
FINAL_SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Cell:
    """One setting and the methods that are compared in it.

    Attributes:
        name: of the cell.
        common: keys of ``hpcasync simulate`` that all methods share.
        methods: name of a method -> its own keys.
        grid: learning rates, the same for every method.
    """

    name: str
    common: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    grid: Sequence[float]


@dataclass
class Summary:
    """A method's final runs in one cell.

    ``accuracy`` of the last evaluation, ``unrest`` the standard deviation of the accuracy over the last half of the evaluations,
    ``jump`` the mean |acc_t - acc_(t-1)| over all of them, ``area`` the mean training loss over the run (lower: faster per
    update); each a list with one entry per seed, accuracies in %. ``diverged``: final accuracy below twice chance or not finite.
    """

    method: str
    lr: float
    accuracy: list[float] = field(default_factory=list)
    unrest: list[float] = field(default_factory=list)
    jump: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    curves: list[np.ndarray] = field(default_factory=list)
    diverged: int = 0

    def mean(self, name: str) -> float:
        """Mean of a column over the seeds."""
        return float(np.mean(getattr(self, name)))

    def spread(self, name: str) -> float:
        """Sample standard deviation of a column over the seeds."""
        values = getattr(self, name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


Claim = Callable[[dict[str, dict[str, Summary]]], list[tuple[str, bool, str]]]
"""From cell -> method -> summary to lines: (what is claimed, held, the numbers)."""


def main(name: str, cells: Sequence[Cell], quick: Sequence[Cell], claims: Claim) -> None:
    """The command line of a recipe."""
    parser = argparse.ArgumentParser(description=f"Convergence recipe {name}: resumable; see _recipe.py.")
    parser.add_argument("--quick", action="store_true", help="a smoke run on the embedded digits, minutes at most")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "convergence" / "results" / name)
    parser.add_argument("--cells", nargs="*", help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop starting runs after so long; run again to go on")
    args = parser.parse_args()
    chosen = quick if args.quick else [c for c in cells if not args.cells or c.name in args.cells]
    final = FINAL_SEEDS[:2] if args.quick else FINAL_SEEDS
    runner = _Runner(args.output / "runs", args.processes, args.minutes)
    table: dict[str, dict[str, Summary]] = {}
    for cell in chosen:
        found = _cell(cell, runner, final)
        if found is None:
            print(f"{cell.name}: not finished; run again to go on")
            continue
        table[cell.name] = found
        print(_markdown(cell.name, found), flush=True)
    lines = claims(table)
    text = "\n".join(f"- {'held' if held else 'NOT held'}: {what} ({numbers})" for what, held, numbers in lines)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    _write_csv(args.output / "table.csv", table)
    _plot(args.output / "curves.png", table)
    body = "\n\n".join(_markdown(c, found) for c, found in table.items())
    (args.output / "table.md").write_text(f"{body}\n\n{text}\n")


def _cell(cell: Cell, runner: _Runner, seeds: Sequence[int]) -> dict[str, Summary] | None:
    tuning = {
        (m, lr): [_keys(cell, m, lr, s) for s in TUNING_SEEDS] for m in cell.methods for lr in cell.grid
    }
    done = runner.run([k for keys in tuning.values() for k in keys])
    if done is None:
        return None
    best = {}
    for method in cell.methods:
        score = {lr: np.mean([_final(done[_hash(k)]) for k in tuning[method, lr]]) for lr in cell.grid}
        best[method] = max(cell.grid, key=lambda lr, score=score: score[lr])
    finals = {m: [_keys(cell, m, best[m], s) for s in seeds] for m in cell.methods}
    done = runner.run([k for keys in finals.values() for k in keys])
    if done is None:
        return None
    return {m: _summary(m, best[m], [done[_hash(k)] for k in finals[m]]) for m in cell.methods}


def _keys(cell: Cell, method: str, lr: float, seed: int) -> dict[str, Any]:
    return {**cell.common, **cell.methods[method], "lr": lr, "seed": seed}


def _hash(keys: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


class _Runner:
    """Runs simulations that have no result yet, several at a time."""

    def __init__(self, folder: Path, processes: int, minutes: float) -> None:
        self.folder, self.processes = folder, processes
        self.end = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, all_keys: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        """The results by hash; None when the time is up before all are there."""
        todo = [(k, self.folder / f"{_hash(k)}.json", self.end) for k in all_keys]
        todo = [t for t in todo if not t[1].exists()]
        if todo:
            with multiprocessing.get_context("spawn").Pool(self.processes) as pool:
                for _ in pool.imap_unordered(_one, todo):
                    pass
        files = {_hash(k): self.folder / f"{_hash(k)}.json" for k in all_keys}
        if not all(f.exists() for f in files.values()):
            return None
        return {h: json.loads(f.read_text()) for h, f in files.items()}


def _one(task: tuple[dict[str, Any], Path, float]) -> None:
    keys, path, end = task
    if time.monotonic() > end:
        return
    import torch

    from hpcasync.data.atomic import replacing
    from hpcasync.simulate.config import make_simulate_config
    from hpcasync.simulate.run import simulate

    torch.set_num_threads(1)
    outcome = simulate(make_simulate_config(keys), records=False, shown=False)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"keys": keys, "result": outcome.result, "curve": outcome.curve}))


def _final(run: Mapping[str, Any]) -> float:
    accuracy = run["result"]["test_accuracy"]
    return accuracy if np.isfinite(run["result"]["test_loss"]) else 0.0


def _summary(method: str, lr: float, runs: Sequence[Mapping[str, Any]]) -> Summary:
    summary = Summary(method, lr)
    for run in runs:
        curve = 100 * np.array([row["test_accuracy"] for row in run["curve"]])
        summary.curves.append(np.stack([[row["epoch"] for row in run["curve"]], curve]))
        # An evaluation right after another has no training loss of its own.
        losses = np.array([row["train_loss"] for row in run["curve"] if row["train_loss"] == row["train_loss"]])
        summary.accuracy.append(100 * _final(run))
        summary.unrest.append(float(curve[len(curve) // 2 :].std()))
        summary.jump.append(float(np.abs(np.diff(curve)).mean()) if len(curve) > 1 else 0.0)
        summary.loss.append(float(losses[-1]))
        summary.area.append(float(losses.mean()))
        summary.staleness.append(run["result"]["staleness"]["mean"])
        summary.diverged += _final(run) < 0.2
    return summary


_COLUMNS = ("accuracy", "unrest", "jump", "loss", "area", "staleness")


def _markdown(cell: str, table: Mapping[str, Summary]) -> str:
    columns = ("method", "best lr", "test accuracy, %", "unrest, points", "jump, points", "final train loss", "mean train loss")
    columns += ("staleness", "diverged")
    lines = [f"**{cell}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for s in table.values():
        cells = [
            f"{s.mean('accuracy'):.2f} ± {s.spread('accuracy'):.2f}",
            f"{s.mean('unrest'):.2f} ± {s.spread('unrest'):.2f}",
            f"{s.mean('jump'):.2f}",
            f"{s.mean('loss'):.3f}",
            f"{s.mean('area'):.3f}",
            f"{s.mean('staleness'):.1f}",
            f"{s.diverged} of {len(s.accuracy)}",
        ]
        lines.append(f"| {s.method} | {s.lr:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(path: Path, table: Mapping[str, Mapping[str, Summary]]) -> None:
    """Test accuracy against epochs, a panel per cell: mean over the seeds, and a band of one standard deviation."""
    from matplotlib.figure import Figure

    if not table:
        return
    figure = Figure(figsize=(9, 4.5 * len(table)), layout="constrained")
    for axis, (cell, methods) in zip(figure.subplots(len(table), 1, squeeze=False).flat, table.items(), strict=True):
        for s in methods.values():
            points = min(c.shape[1] for c in s.curves)
            x, y = s.curves[0][0, :points], np.array([c[1, :points] for c in s.curves])
            (line,) = axis.plot(x, y.mean(0), label=f"{s.method}, lr {s.lr:g}")
            axis.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=line.get_color(), alpha=0.15, linewidth=0)
        top = max(s.mean("accuracy") for s in methods.values())
        axis.set(title=cell, xlabel="epoch", ylabel="test accuracy, %", ylim=(max(0, top - 30), min(100, top + 3)))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _write_csv(path: Path, table: Mapping[str, Mapping[str, Summary]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "method", "lr", "seeds", "diverged", *(f"{c}_{k}" for c in _COLUMNS for k in ("mean", "sd"))])
        for cell, methods in table.items():
            for s in methods.values():
                numbers = [f"{f(c):.6g}" for c in _COLUMNS for f in (s.mean, s.spread)]
                writer.writerow([cell, s.method, s.lr, len(s.accuracy), s.diverged, *numbers])
