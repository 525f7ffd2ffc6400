"""What the convergence recipes share: cells, the choice of each method's rate, summaries, claims, tables.

A recipe is a list of cells (a setting: data, model, workers, base) with methods in it. Every method of a cell tries the cell's
one grid of learning rates, and its own alternatives where it has some, with the first tuning seed; the best two also with the
second. The best by the mean over both then runs with the final seeds, which are others. All runs are simulated
(``hpcasync.simulate``): virtual workers, real gradients on real data.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _pictures import curves, panels
from _runs import Keys, Run, Runner

REPO = Path(__file__).resolve().parents[2]
TUNING_SEEDS = (100, 101)
FINAL_SEEDS = (0, 1, 2, 3, 4)
SMALL = "_models:small"  # the perceptron of most cells
SECOND_LOOK = 2  # settings of a method that see the second tuning seed


@dataclass(frozen=True)
class Cell:
    """One setting and the methods that are compared in it.

    Attributes:
        name: of the cell.
        common: keys of a run that all methods share.
        methods: name of a method -> its own keys, or several alternatives of which the best is taken. ``scale`` among them
            is a factor on the grid, for a method whose learning rate has another unit.
        grid: learning rates, the same for every method.
        place: where the cell stands in the summary picture and table: its panel's name and its x.
        target: test accuracy in %, if the methods are judged by the epochs that they need to it instead of by the last accuracy.
    """

    name: str
    common: Keys
    methods: Mapping[str, Keys | Sequence[Keys]]
    grid: Sequence[float]
    place: tuple[str, float] = ("", 0)
    target: float | None = None


@dataclass
class Summary:
    """A method's final runs in one cell.

    ``accuracy`` of the last evaluation, ``unrest`` the standard deviation of the accuracy over the last half of the evaluations,
    ``jump`` the mean |acc_t - acc_(t-1)| over all of them, ``area`` the mean training loss over the run (lower: faster per
    update); each a list with one entry per seed, accuracies in %. ``diverged``: final accuracy below twice chance or not finite.
    ``edge``: the best rate is the first or last of the grid, so a better one may lie outside. ``score``: what the tuning seeds
    gave at that rate. ``reach``: epochs to the cell's target, between two evaluations interpolated; a run that never got there
    counts as one epoch more than it had, and in ``missed``.
    """

    method: str
    lr: float
    edge: bool = False
    chosen: Keys = field(default_factory=dict)
    score: float = 0.0
    accuracy: list[float] = field(default_factory=list)
    unrest: list[float] = field(default_factory=list)
    jump: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    curves: list[np.ndarray] = field(default_factory=list)
    diverged: int = 0
    missed: int = 0

    def mean(self, name: str) -> float:
        """Mean of a column over the seeds."""
        return float(np.mean(getattr(self, name)))

    def spread(self, name: str) -> float:
        """Sample standard deviation of a column over the seeds."""
        values = getattr(self, name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


Table = dict[str, dict[str, Summary]]
"""Cell -> method -> summary."""
Line = tuple[str, bool, str]
"""What is claimed ("cell: claim"), held, the numbers."""
Claim = Callable[[Table], list[Line]]


def above(claim: str, ours: Summary, theirs: Summary, column: str = "accuracy", *, less: float = 0.0) -> Line:
    """The claim that our mean is above theirs less a margin, with the standard error of the difference, paired by seed."""
    return _line(claim, np.array(getattr(ours, column)) - getattr(theirs, column) + less, ours, theirs, column)


def below(claim: str, ours: Summary, theirs: Summary, column: str, *, factor: float = 1.0) -> Line:
    """The claim that our mean is below ``factor`` times theirs."""
    return _line(claim, factor * np.array(getattr(theirs, column)) - getattr(ours, column), ours, theirs, column)


def _line(claim: str, ahead: np.ndarray, ours: Summary, theirs: Summary, column: str) -> Line:
    error = ahead.std(ddof=1) / np.sqrt(len(ahead)) if len(ahead) > 1 else np.inf
    sure = "clear" if abs(ahead.mean()) > 2 * error else "within noise"
    digits = 3 if column in ("area", "loss") else 2
    numbers = f"{ours.mean(column):.{digits}f} against {theirs.mean(column):.{digits}f}, {sure}"
    return claim, bool(ahead.mean() > 0), numbers


def main(
    name: str,
    cells: Sequence[Cell],
    quick: Sequence[Cell],
    claims: Claim,
    extra: Callable[[Table, Sequence[Cell], Path], str] | None = None,
    xlabel: str = "workers",
) -> None:
    """The command line of a recipe.

    Args:
        name: of the folder of results.
        cells: of the whole recipe, the most important ones first.
        quick: cells of the smoke run.
        claims: what is to be checked.
        extra: further Markdown and pictures of the results: told the table, the cells and the folder.
        xlabel: of the summary picture.
    """
    parser = argparse.ArgumentParser(description=f"Convergence recipe {name}: resumable; see _recipe.py.")
    parser.add_argument("--quick", action="store_true", help="a smoke run on the embedded digits, minutes at most")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "convergence" / "results" / name)
    parser.add_argument("--cells", nargs="*", help="only these")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop starting runs after so long; run again to go on")
    args = parser.parse_args()
    chosen = quick if args.quick else [c for c in cells if not args.cells or c.name in args.cells]
    if args.list:
        print("\n".join(c.name for c in chosen))
        return
    seeds = FINAL_SEEDS[:2] if args.quick else FINAL_SEEDS
    runner = Runner(args.output / "runs", args.processes, args.minutes)
    table: Table = {}
    for cell in chosen:
        found = _cell(cell, runner, seeds)
        if found is None:
            print(f"{cell.name}: not finished; run again to go on", flush=True)
            continue
        table[cell.name] = found
        print(_markdown(cell.name, found), flush=True)
    lines = claims(table)
    print("\n".join(_told(line) for line in lines))
    args.output.mkdir(parents=True, exist_ok=True)
    _write_csv(args.output / "table.csv", table)
    parts = [_tally(lines), _pivot(table, chosen)]
    if extra is not None:
        parts.append(extra(table, chosen, args.output))
    parts += [_markdown(c, found) for c, found in table.items()]
    parts.append("\n".join(_told(line) for line in lines))
    (args.output / "table.md").write_text("\n\n".join(p for p in parts if p) + "\n")
    curves(args.output / "curves.png", {c: {m: (s.lr, s.curves) for m, s in found.items()} for c, found in table.items()})
    placed = {c.name: c.place for c in chosen if c.place[0] and c.name in table}
    panels(args.output / "summary.png", _panels(table, placed), xlabel)


def _cell(cell: Cell, runner: Runner, seeds: Sequence[int]) -> dict[str, Summary] | None:
    tries = {m: [(keys, lr) for keys in _alternatives(own) for lr in cell.grid] for m, own in cell.methods.items()}

    def score(settings: Mapping[str, list[tuple[Keys, float]]], seed: int) -> dict[str, list[float]] | None:
        runs = runner.run([_keys(cell, keys, lr, seed) for all_ in settings.values() for keys, lr in all_])
        if runs is None:
            return None
        scores = iter([score_of(run, cell.target) for run in runs])
        return {m: [next(scores) for _ in all_] for m, all_ in settings.items()}

    first = score(tries, TUNING_SEEDS[0])
    if first is None:
        return None
    order = {m: np.argsort(first[m])[::-1][:SECOND_LOOK].tolist() for m in tries}
    second = score({m: [tries[m][i] for i in order[m]] for m in tries}, TUNING_SEEDS[1])
    if second is None:
        return None
    best, scores = {}, {}
    for m, settings in tries.items():
        scores[m], index = max(((first[m][i] + s) / 2, i) for i, s in zip(order[m], second[m], strict=True))
        best[m] = settings[index]
    runs = runner.run([_keys(cell, keys, lr, seed) for keys, lr in best.values() for seed in seeds])
    if runs is None:
        return None
    shares = iter(runs)
    found = {}
    for method, (keys, lr) in best.items():
        edge = len(cell.grid) > 1 and lr in (cell.grid[0], cell.grid[-1])
        chosen = keys if len(_alternatives(cell.methods[method])) > 1 else {}
        summary = Summary(method, lr * keys.get("scale", 1), edge, chosen, scores[method])
        found[method] = summarise(summary, [next(shares) for _ in seeds], cell.target)
    return found


def _alternatives(own: Keys | Sequence[Keys]) -> Sequence[Keys]:
    return [own] if isinstance(own, Mapping) else own


def _keys(cell: Cell, own: Keys, lr: float, seed: int) -> Keys:
    keys = {**cell.common, **own, "seed": seed, "lr": lr * own.get("scale", 1)}
    keys.pop("scale", None)
    return keys


def score_of(run: Run, target: float | None) -> float:
    """What the best rate has most of: mean accuracy over the last quarter of the evaluations, less a matter of chance than the
    last one, and 0 if the run diverged; with a target, the epochs to it, negative."""
    if target is not None:
        return -reach_of(run, target)
    last = [row["test_accuracy"] for row in run["curve"]][-max(1, len(run["curve"]) // 4) :]
    return float(np.mean(last)) if np.isfinite(run["result"]["test_loss"]) else 0.0


def reach_of(run: Run, target: float) -> float:
    """Epochs until the accuracy is the target, see ``Summary``; before the first evaluation it is taken to rise from 0."""
    epochs = [0.0, *(row["epoch"] for row in run["curve"])]
    accuracy = [0.0, *(100 * row["test_accuracy"] for row in run["curve"])]
    for i in range(1, len(epochs)):
        if accuracy[i] >= target:
            share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return epochs[i - 1] + share * (epochs[i] - epochs[i - 1])
    return epochs[-1] + 1


def summarise(summary: Summary, runs: Sequence[Run], target: float | None = None) -> Summary:
    """Fill in a summary from its runs."""
    for run in runs:
        final = run["result"]["test_accuracy"] if np.isfinite(run["result"]["test_loss"]) else 0.0
        curve = 100 * np.array([row["test_accuracy"] for row in run["curve"]])
        summary.curves.append(np.stack([[row["epoch"] for row in run["curve"]], curve]))
        # An evaluation right after another has no training loss of its own.
        losses = np.array([row["train_loss"] for row in run["curve"] if row["train_loss"] == row["train_loss"]])
        summary.accuracy.append(100 * final)
        summary.unrest.append(float(curve[len(curve) // 2 :].std()))
        summary.jump.append(float(np.abs(np.diff(curve)).mean()) if len(curve) > 1 else 0.0)
        summary.loss.append(float(losses[-1]) if losses.size else float("nan"))
        summary.area.append(float(losses.mean()) if losses.size else float("nan"))
        summary.staleness.append(run["result"]["staleness"]["mean"] or 0.0)
        summary.seconds.append(run["result"]["virtual_seconds"])
        summary.diverged += final < 0.2
        if target is not None:
            summary.reach.append(reach_of(run, target))
            summary.missed += summary.reach[-1] > run["curve"][-1]["epoch"]
    return summary


_COLUMNS = ("accuracy", "unrest", "jump", "loss", "area", "staleness", "seconds")


def _told(line: Line) -> str:
    claim, held, numbers = line
    return f"- {'held' if held else 'NOT held'}: {claim} ({numbers})"


def _tally(lines: Sequence[Line]) -> str:
    """How often each claim held over the cells, and in which it did not."""
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(line[0].partition(": ")[2], []).append(line)
    rows = ["| claim | held | clearly held | NOT held in (clearly: bold) |", "|---|---|---|---|"]
    for kind, all_ in kinds.items():
        failed = "; ".join(_mark(c.partition(": ")[0], n) for c, held, n in all_ if not held) or "-"
        clear = sum(held and "within noise" not in n for _, held, n in all_)
        rows.append(f"| {kind} | {sum(held for _, held, _ in all_)} of {len(all_)} | {clear} | {failed} |")
    return "\n".join(rows) if kinds else ""


def _mark(cell: str, numbers: str) -> str:
    return cell if "within noise" in numbers else f"**{cell}**"


def _panels(table: Table, placed: Mapping[str, tuple[str, float]]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for cell, (panel, x) in placed.items():
        for m, s in table[cell].items():
            found.setdefault(panel, {}).setdefault(m, []).append((x, s.mean("accuracy"), s.spread("accuracy")))
    return found


def _pivot(table: Table, cells: Sequence[Cell]) -> str:
    """Final accuracies, a row per panel and method, a column per x."""
    placed = {c.name: c.place for c in cells if c.place[0] and c.name in table}
    if len(placed) < 2:
        return ""
    columns = sorted({x for _, x in placed.values()})
    rows = [f"| setting | method | {' | '.join(f'{x:g}' for x in columns)} |", "|---|---" + "|---" * len(columns) + "|"]
    for panel, methods in _panels(table, placed).items():
        for m, points in methods.items():
            at = {x: f"{mean:.2f} ± {sd:.2f}" for x, mean, sd in points}
            rows.append(f"| {panel} | {m} | {' | '.join(at.get(x, '') for x in columns)} |")
    return "\n".join(rows)


def _markdown(cell: str, table: Mapping[str, Summary]) -> str:
    columns = ("method", "best lr", "test accuracy, %", "unrest, points", "jump, points", "final train loss", "mean train loss")
    columns += ("staleness", "diverged")
    lines = [f"**{cell}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for s in table.values():
        chosen = ", ".join(f"{k} {v}" for k, v in s.chosen.items() if k not in ("rule", "base", "scale"))
        cells = [
            f"{s.mean('accuracy'):.2f} ± {s.spread('accuracy'):.2f}",
            f"{s.mean('unrest'):.2f} ± {s.spread('unrest'):.2f}",
            f"{s.mean('jump'):.2f}",
            f"{s.mean('loss'):.3f}",
            f"{s.mean('area'):.3f}",
            f"{s.mean('staleness'):.1f}",
            f"{s.diverged} of {len(s.accuracy)}",
        ]
        name = f"{s.method} ({chosen})" if chosen else s.method
        lines.append(f"| {name} | {s.lr:g}{' (edge)' if s.edge else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write_csv(path: Path, table: Table) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["cell", "method", "lr", "edge", "chosen", "seeds", "diverged"]
        writer.writerow([*head, *(f"{c}_{k}" for c in _COLUMNS for k in ("mean", "sd"))])
        for cell, methods in table.items():
            for s in methods.values():
                numbers = [f"{f(c):.6g}" for c in _COLUMNS for f in (s.mean, s.spread)]
                chosen = " ".join(f"{k}={v}" for k, v in s.chosen.items())
                writer.writerow([cell, s.method, f"{s.lr:g}", int(s.edge), chosen, len(s.accuracy), s.diverged, *numbers])
