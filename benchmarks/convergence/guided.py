"""Guided SGD: gSSGD against SSGD and gASGD against ASGD, at equal epochs and at equal gradient evaluations.

Claim (ALGORITHMS.md, section 2): guided accuracy is higher than that of SSGD / ASGD on real tabular sets with softmax
regression (batch 4, rho = P = 10), and on images. Every pair of runs has the same cut of the data, the same start and the same
order of batches; differences are paired by seed. Two settings:

- authors: eta 0.1 and the best epoch BY TEST ACCURACY, as the authors' released program reports it (Main.java keeps the weights
  of the best epoch on the test data; 50 epochs, 30 runs). An optimistic number on both sides.
- honest: each method's learning rate from one grid, by final accuracy on a validation part of the training data over the
  tuning seeds; the accuracy reported is that of the last epoch.

"Equal gradient evaluations": the unguided run goes on until it has evaluated as many gradients as the guided one with its
replays, to the nearest whole epoch. Forward passes for verification and scores are counted in the table and not given to the
unguided run.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _live import live
from _pictures import curves
from _recipe import REPO, Line, _tally, _told
from _runs import Keys, Run, Runner

WORKERS = RHO = 10
AUTHORS_LR = 0.1
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# The authors' RMSProp has decay 0.9; both their adaptive bases have eps 1e-8.
BASES: dict[str, Keys] = {
    "sgd": {"base": "sgd"},
    "rmsprop": {"base": "rmsprop", "alpha": 0.9},
    "adagrad": {"base": "adagrad"},
}
NAMES = {"sync": ("SSGD", "gSSGD"), "async": ("ASGD", "gASGD")}
RIVALS = ("equal epochs", "equal gradients")
MOST = 1.4
"""Gradients of a guided run, at most, in those of an unguided one: 4 replays per 10 steps."""


@dataclass(frozen=True)
class Cell:
    """A data set, a base and a mode; ``seeds`` final runs of ``epochs``, learning rates chosen with ``tuning`` seeds."""

    data: str
    base: str
    mode: str
    epochs: int
    seeds: int = 30
    tuning: int = 3
    model: str = "logistic"
    grid: Sequence[float] = GRID

    @property
    def name(self) -> str:
        data = self.data if self.model == "logistic" else f"{self.data}, {self.model}"
        return f"{data}, {self.base}, {NAMES[self.mode][1]}"

    def keys(self, *, guided: bool, lr: float, seed: int, part: str = "test") -> Keys:
        """Keys of a run; the unguided one is long enough for the guided one's gradients."""
        epochs = self.epochs if guided or part == "validation" else math.ceil(MOST * self.epochs)
        setting = {"data": self.data, "pool": part, "model": self.model, "workers": WORKERS, "batch": 4, "epochs": epochs}
        own = {"mode": self.mode, "rule": "plain", **BASES[self.base], "compute": "exponential:1.0", "lr": lr, "seed": seed}
        return {**setting, **own, **({"guided": True, "rho": RHO} if guided else {})}


@dataclass(frozen=True)
class Pairs:
    """Guided and unguided accuracies in %, per seed, in one cell and setting, with what guidance cost."""

    lr: tuple[float, float]
    guided: np.ndarray
    rivals: Mapping[str, np.ndarray]
    gradients: float
    forwards: float
    lines: Mapping[str, list[np.ndarray]]

    def told(self, rival: str) -> str:
        """The mean paired difference with its standard error, and how many seeds win and lose."""
        ahead = self.guided - self.rivals[rival]
        error = ahead.std(ddof=1) / math.sqrt(len(ahead))
        sure = "clear" if abs(ahead.mean()) > 2 * error else "within noise"
        return f"{ahead.mean():+.2f} ± {error:.2f}, {(ahead > 0).sum()}:{(ahead < 0).sum()}, {sure}"


Table = dict[tuple[str, str], Pairs]
"""(setting, cell) -> pairs."""


def _cells() -> Iterator[Cell]:
    for base in BASES:
        for data, epochs in (("breast-cancer", 20), ("wine", 50), ("uci-digits", 10)):
            for mode in NAMES:
                yield Cell(data, base, mode, epochs)
    for model, epochs, seeds in (("mlp", 3, 10), ("lenet5", 2, 6)):
        for mode in NAMES:
            yield Cell("mnist-part", "sgd", mode, epochs, seeds, model=model, grid=(0.01, 0.03, 0.1, 0.3))


QUICK = [Cell("wine", base, mode, 8, seeds=3, tuning=1, grid=(0.03, 0.1)) for base in ("sgd", "adagrad") for mode in NAMES]


def _curve(run: Run) -> np.ndarray:
    return 100 * np.array([row["test_accuracy"] for row in run["curve"]])


def _final(run: Run) -> float:
    return float(_curve(run)[-1]) if np.isfinite(run["result"]["test_loss"]) else 0.0


def _ordinary(run: Run) -> int:
    """Gradients of a guided run without its replays."""
    result, replays = run["result"], run["result"]["guided"]["replays"]
    return (result["updates"] - replays) * (WORKERS if result["mode"] == "sync" else 1)


def _tuned(cell: Cell, runner: Runner) -> tuple[float, float] | None:
    """The learning rates of the unguided and the guided method, by the validation part; of equals the one of lower loss."""
    seeds = range(100, 100 + cell.tuning)
    tries = [(g, lr) for g in (False, True) for lr in cell.grid]
    runs = runner.run([cell.keys(guided=g, lr=lr, seed=s, part="validation") for g, lr in tries for s in seeds])
    if runs is None:
        return None
    shape = (2, len(cell.grid), cell.tuning)
    accuracy = np.array([_final(run) for run in runs]).reshape(shape).mean(2)
    loss = np.nan_to_num(np.array([run["result"]["test_loss"] for run in runs]), nan=np.inf).reshape(shape).mean(2)
    # The last of a stable sort is the best.
    plain, guided = (int(np.lexsort((-loss[g], np.round(accuracy[g], 6)))[-1]) for g in (0, 1))
    return cell.grid[plain], cell.grid[guided]


def _pairs(cell: Cell, lr: tuple[float, float], best: bool, runner: Runner) -> Pairs | None:
    seeds = range(cell.seeds)
    runs = runner.run([cell.keys(guided=g, lr=lr[g], seed=s) for g in (False, True) for s in seeds])
    if runs is None:
        return None
    plain, guided = runs[: cell.seeds], runs[cell.seeds :]
    cost = np.array([1 + run["result"]["guided"]["gradients"] / _ordinary(run) for run in guided])
    forwards = np.mean([run["result"]["guided"]["evaluations"] / _ordinary(run) for run in guided])

    def accuracy(run: Run, epochs: int) -> float:
        upto = np.nan_to_num(_curve(run))[:epochs]
        return float(upto.max() if best else upto[-1])

    epochs = {"equal epochs": [cell.epochs] * cell.seeds, "equal gradients": np.rint(cell.epochs * cost).astype(int)}
    names = NAMES[cell.mode]
    lines = {n: [np.stack([np.arange(1, len(_curve(r)) + 1), _curve(r)]) for r in rs] for n, rs in zip(names, (plain, guided))}
    return Pairs(
        lr,
        np.array([accuracy(run, cell.epochs) for run in guided]),
        {rival: np.array([accuracy(run, e) for run, e in zip(plain, each)]) for rival, each in epochs.items()},
        float(cost.mean()),
        float(forwards),
        lines,
    )


def _lines(table: Table) -> list[Line]:
    """The claim, setting by setting and rival by rival."""
    return [
        (f"{cell}: {setting}, more accurate at {rival}", bool((p.guided - p.rivals[rival]).mean() > 0), p.told(rival))
        for setting in ("authors", "honest")
        for rival in RIVALS
        for (s, cell), p in table.items()
        if s == setting
    ]


def _markdown(table: Table, cells: Sequence[Cell]) -> str:
    """A table per setting; differences in points: mean ± standard error, seeds won:lost."""
    parts = []
    columns = ("cell", "epochs, seeds", "lr unguided, guided", "guided, %", *(f"unguided at {r}, % (difference)" for r in RIVALS))
    columns += ("gradients", "forward passes per step")
    for setting, what in (("authors", "eta 0.1, best epoch by test accuracy"), ("honest", "tuned eta, last epoch")):
        rows = [f"**{setting}: {what}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for cell in cells:
            p = table.get((setting, cell.name))
            if p is None:
                continue
            rivals = [f"{_spread(values)} ({p.told(rival)})" for rival, values in p.rivals.items()]
            row = [cell.name, f"{cell.epochs}, {cell.seeds}", f"{p.lr[0]:g}, {p.lr[1]:g}", _spread(p.guided), *rivals]
            rows.append(f"| {' | '.join([*row, f'x {p.gradients:.2f}', f'{p.forwards:.1f}'])} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def _write_csv(path: Path, table: Table, cells: Sequence[Cell]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["setting", "cell", "method", "lr", "epochs", "seeds", "gradients", "forwards", "accuracy_mean", "accuracy_sd"]
        writer.writerow([*head, "guided_ahead_mean", "guided_ahead_se", "won", "lost"])
        by_name = {cell.name: cell for cell in cells}
        for (setting, name), p in table.items():
            cell = by_name[name]
            plain, guided = NAMES[cell.mode]

            def row(method: str, values: np.ndarray, own: Sequence[Any], cell: Cell = cell, setting: str = setting) -> list[Any]:
                numbers = [f"{values.mean():.4f}", f"{values.std(ddof=1):.4f}"]
                return [setting, cell.name, method, own[0], cell.epochs, cell.seeds, *own[1:], *numbers]

            writer.writerow(row(guided, p.guided, [f"{p.lr[1]:g}", f"{p.gradients:.4f}", f"{p.forwards:.4f}"]))
            for rival, values in p.rivals.items():
                ahead = p.guided - values
                spent = "1" if rival == "equal epochs" else f"{p.gradients:.4f}"
                error = ahead.std(ddof=1) / math.sqrt(len(ahead))
                tail = [f"{ahead.mean():.4f}", f"{error:.4f}", (ahead > 0).sum(), (ahead < 0).sum()]
                writer.writerow([*row(f"{plain} at {rival}", values, [f"{p.lr[0]:g}", spent, "0"]), *tail])


def _differences(path: Path, table: Table) -> None:
    """How far guided is ahead, a row per cell, with two standard errors."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(cell for _, cell in table))
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(cells)), layout="constrained")
    for axis, setting in zip(figure.subplots(1, 2, sharey=True), ("authors", "honest")):
        for shift, rival in ((0.15, RIVALS[0]), (-0.15, RIVALS[1])):
            ahead = [table[setting, c].guided - table[setting, c].rivals[rival] for c in cells if (setting, c) in table]
            y = [i + shift for i, c in enumerate(cells) if (setting, c) in table]
            errors = [2 * a.std(ddof=1) / math.sqrt(len(a)) for a in ahead]
            axis.errorbar([a.mean() for a in ahead], y, xerr=errors, fmt="o", ms=4, capsize=2, label=f"at {rival}")
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"{setting} setting", xlabel="guided ahead, points of test accuracy (bars: 2 standard errors)")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yticks(range(len(cells)), cells, fontsize="small")
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _live(output: Path, seeds: int = 5) -> str:
    """gSSGD and gASGD on 2 and 4 real ranks beside as many virtual workers, on the same data: a Markdown table."""
    runner = Runner(output / "runs", 1, 1e9)
    rows = ["| method | live accuracy, % | simulated | live replays' gradients | simulated | live staleness | simulated |"]
    rows.append("|---" * 7 + "|")
    for mode in NAMES:
        for ranks in (2, 4):
            cell = Cell("uci-digits", "sgd", mode, 3, seeds)
            wanted = [{**cell.keys(guided=True, lr=AUTHORS_LR, seed=s), "workers": ranks} for s in range(seeds)]
            simulated = [run["result"] for run in runner.run(wanted) or []]
            sides = ([live(keys, output / "runs") for keys in wanted], simulated)
            accuracy = [_spread(100 * np.array([r["test_accuracy"] for r in side])) for side in sides]
            gradients = [_spread(np.array([r["guided"]["gradients"] for r in side])) for side in sides]
            stale = [f"{np.mean([r['staleness']['mean'] or 0 for r in side]):.2f}" for side in sides]
            row = [f"{NAMES[mode][1]}, {ranks} ranks", *accuracy, *gradients, *stale]
            rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0] + " Resumable; see _runs.py.")
    parser.add_argument("--quick", action="store_true", help="a smoke run on wine, seconds")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "convergence" / "results" / "guided")
    parser.add_argument("--cells", nargs="*", help="only these")
    parser.add_argument("--live", action="store_true", help="only set live runs beside simulated ones")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--processes", type=int, help="runs at a time (default: the cores; 1 with --quick)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop starting runs after so long; run again to go on")
    args = parser.parse_args()
    cells = QUICK if args.quick else [c for c in _cells() if not args.cells or c.name in args.cells]
    if args.list:
        print("\n".join(c.name for c in cells))
        return
    if args.live:
        text = _live(args.output)
        (args.output / "live.md").write_text(f"{text}\n")
        print(text)
        return
    runner = Runner(args.output / "runs", args.processes or (1 if args.quick else os.cpu_count() or 1), args.minutes)
    table: Table = {}
    for cell in cells:
        tuned = _tuned(cell, runner)
        for setting, lr in (("authors", (AUTHORS_LR, AUTHORS_LR)), ("honest", tuned)):
            pairs = _pairs(cell, lr, setting == "authors", runner) if lr is not None else None
            if pairs is None:
                print(f"{cell.name}, {setting}: not finished; run again to go on", flush=True)
            else:
                table[setting, cell.name] = pairs
    if not table:
        return
    text = _markdown(table, cells)
    lines = _lines(table)
    told = "\n".join(_told(line) for line in lines)
    print(f"{text}\n\n{told}")
    args.output.mkdir(parents=True, exist_ok=True)
    _write_csv(args.output / "table.csv", table, cells)
    (args.output / "table.md").write_text(f"{_tally(lines)}\n\n{text}\n\n{told}\n")
    _differences(args.output / "differences.png", table)
    shown = {c.name: c for c in cells if c.base == "sgd" and c.model != "mlp" and ("honest", c.name) in table}
    learned = {n: table["honest", n] for n in shown}
    curves(
        args.output / "curves.png",
        {n: {m: (p.lr[i], p.lines[m]) for i, m in enumerate(NAMES[shown[n].mode])} for n, p in learned.items()},
    )


if __name__ == "__main__":
    main()
