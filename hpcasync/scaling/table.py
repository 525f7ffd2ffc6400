"""From the files that the ranks wrote: a table with medians, intervals and efficiencies, as CSV, Markdown and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError, damaged
from hpcasync.scaling.cases import BASE, KINDS
from hpcasync.stats import INTERVAL_LEAST, median_interval

COLUMNS = (
    "kind", "what", "ranks", "nodes", "batch", "rounds", "samples_per_second", "low", "high", "efficiency", "compute",
    "communicate", "wait", "staleness", "own", "lr", "to_target", "epochs_to_target", "reached",
)  # fmt: skip
_KEY = ("kind", "what", "ranks", "nodes", "batch")
_BASE_SETTINGS = ("data", "model", "threads", "device")
_SETTINGS = (*_BASE_SETTINGS, "every", "collectives", "slow")
"""Of a launch: cases that differ in them are lines of their own, and only those of ``_BASE_SETTINGS`` concern the base."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """What every launch wrote into ``folder``: a row per case and round.

    Raises:
        UsageError: no such files, or damaged ones.
    """
    files = sorted(folder.glob("ranks-*.json"))
    if not files:
        make = f"mpiexec -n 2 hpcasync bench scaling --out {folder}"
        raise UsageError(f"{folder} holds no measurement (ranks-*.json); make one: {make}")
    rows: list[dict[str, Any]] = []
    for path in files:
        with damaged(f"{path} is no measurement of hpcasync bench scaling", "measure again"):
            measured = json.loads(path.read_text())
            settings = {key: measured.get("settings", {}).get(key) for key in _SETTINGS}
            for row in measured["rows"]:
                rows.append({**{key: row[key] for key in _KEY}, **row, **settings})
    return rows


def tabulate(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per case with `COLUMNS`: medians over the rounds, and an interval of 95 % around that of the throughput (below
    six rounds the extremes). Launches with other settings are other cases, named after what differs.

    ``efficiency`` is the throughput over the number of ranks times that of the plain torch loop in one process, with the
    same batch in weak scaling and with the whole one in strong; NaN where that was not measured. ``lr`` is the learning rate with
    the shortest median time to the target accuracy, where a training that has not come to it counts as endless;
    ``reached`` how many of its trainings have.
    """
    rows = [{**row} | {key: str(row.get(key) or "") for key in _SETTINGS} for row in rows]
    mixed = [key for key in _SETTINGS if len({row[key] for row in rows}) > 1]
    cases: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        cases[tuple(row[key] for key in (*_KEY, *_SETTINGS))].append(row)

    def median(case: Sequence[Mapping[str, Any]], name: str) -> float:
        values = [row[name] for row in case if row.get(name) is not None]
        return float(np.median(values)) if values else float("nan")

    alone = [(key, case) for key, case in cases.items() if key[1] == BASE]
    base = {(key[0], key[4], *(case[0][k] for k in _BASE_SETTINGS)): median(case, "samples_per_second") for key, case in alone}
    lines = []
    for key, case in cases.items():
        line = dict(zip(_KEY, key, strict=False))
        whole = line["batch"] * (line["ranks"] if line["kind"] == "strong" else 1)
        one = base.get((line["kind"], whole, *(case[0][k] for k in _BASE_SETTINGS)), float("nan"))
        line["what"] += "".join(f", {name} {case[0][name]}" for name in mixed if case[0][name])
        speed, low, high = median_interval([row["samples_per_second"] for row in case])
        line |= {"rounds": len(case), "samples_per_second": speed, "low": low, "high": high}
        line["efficiency"] = speed / one / line["ranks"]
        line |= {name: median(case, name) for name in ("compute", "communicate", "wait", "staleness", "own")}
        line |= _trained([training for row in case for training in row.get("trainings", [])])
        lines.append(line)
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(lines, key=lambda line: (order[line["kind"]], not _is_base(line), line["what"], line["ranks"], line["nodes"]))


def _is_base(line: Mapping[str, Any]) -> bool:
    return str(line["what"]).split(", ")[0] == BASE


def _trained(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The learning rate of the quickest trainings, and how they went."""
    best: dict[str, Any] = {"lr": math.nan, "to_target": math.inf, "epochs_to_target": math.inf, "reached": ""}
    for lr in sorted({training["lr"] for training in trainings}):
        mine = [training for training in trainings if training["lr"] == lr]
        seconds, epochs = (np.nan_to_num([t[name] for t in mine], nan=math.inf) for name in ("to_target", "epochs_to_target"))
        found = {"lr": lr, "to_target": float(np.median(seconds)), "epochs_to_target": float(np.median(epochs))}
        if found["to_target"] < best["to_target"] or not best["reached"]:
            best = found | {"reached": f"{np.isfinite(seconds).sum()} of {len(mine)}"}
    return best


def write_table(lines: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write ``scaling.csv``, ``scaling.md`` and, where matplotlib is installed, ``scaling.png``; returns their paths."""
    paths = [folder / "scaling.csv", folder / "scaling.md"]
    with replacing(paths[0]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    with replacing(paths[1]) as temporary:
        temporary.write_text(markdown(lines))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return paths
    figure = Figure(figsize=(10, 3.6 * len({line["kind"] for line in lines})), layout="constrained")
    kinds = [kind for kind in KINDS if any(line["kind"] == kind for line in lines)]
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), kind in zip(axes, kinds, strict=True):
        for what in dict.fromkeys(line["what"] for line in lines if line["kind"] == kind and not _is_base(line)):
            mine = [line for line in lines if (line["kind"], line["what"]) == (kind, what)]
            x, y = [line["ranks"] for line in mine], np.array([line["samples_per_second"] for line in mine])
            bars = np.abs([y - [line["low"] for line in mine], [line["high"] for line in mine] - y])
            left.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=what)
            right.plot(x, [line["efficiency"] for line in mine], marker="o", label=what)
        left.set(xlabel="ranks", ylabel="samples per second", title=f"{kind} scaling", xscale="log", yscale="log")
        right.set(xlabel="ranks", ylabel="efficiency, one torch process = 1", xscale="log", ylim=(0, None))
        ticks = sorted({line["ranks"] for line in lines})
        for ax in (left, right):
            ax.set_xticks(ticks, [str(n) for n in ticks], minor=False)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        left.legend(fontsize="small")
    with replacing(folder / "scaling.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return [*paths, folder / "scaling.png"]


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    trained = any(line["reached"] for line in lines)
    few = any(line["rounds"] < INTERVAL_LEAST for line in lines)
    spread = "lowest - highest" if all(line["rounds"] < INTERVAL_LEAST for line in lines) else "95 % interval"
    spread += f", below {INTERVAL_LEAST} rounds lowest - highest" if few and spread.startswith("95") else ""
    head = (
        "scaling", "what", "ranks", "nodes", "batch", "samples/s", spread, "efficiency",
        "compute / communicate / wait", "staleness", *(("lr", "s to target", "epochs to it", "reached") if trained else ()),
    )  # fmt: skip
    text = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for line in lines:
        split = " / ".join(f"{100 * line[part]:.0f}" for part in ("compute", "communicate", "wait")) + " %"
        cells = [
            line["kind"], line["what"], line["ranks"], line["nodes"], line["batch"], f"{line['samples_per_second']:,.0f}",
            f"{line['low']:,.0f} - {line['high']:,.0f}", _number(line["efficiency"], ".2f"), split,
            _number(line["staleness"], ".2f"),
        ]  # fmt: skip
        if trained:
            cells += [_number(line["lr"], "g"), _number(line["to_target"], ".1f"), _number(line["epochs_to_target"], ".2f")]
            cells.append(line["reached"] or "-")
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"
