"""GSGM against ASGD and its relatives on non-IID data.

Claims (ALGORITHMS.md, section 5): at least 20 % lower instability than ASGD, DC-ASGD and momentum-ASGD at P = 10, and convergence
at P = 30 where they fail or oscillate. Instability is both measures of the table: the standard deviation of the accuracy over
the last half of the evaluations ("unrest"), and the mean |acc_t - acc_(t-1)| ("jump").
"""

from __future__ import annotations

from typing import Any

from _recipe import Cell, Summary, main

RIVALS: dict[str, dict[str, Any]] = {
    "asgd": {"rule": "asgd"},
    "momentum asgd": {"rule": "asgd", "base": "momentum"},
    "dc-asgd": {"rule": "dc-asgd"},
    "staleness-aware": {"rule": "staleness-aware"},
}
METHODS: dict[str, dict[str, Any]] = {
    **RIVALS,
    "gsgm, mu 0": {"rule": "gsgm", "momentum": 0.0},
    "gsgm, mu 0.5": {"rule": "gsgm", "momentum": 0.5},
    "gsgm, mu 0.9": {"rule": "gsgm", "momentum": 0.9},
}
GRID = (0.005, 0.01, 0.025, 0.05, 0.1)
PARTITIONS = ("shards:1", "shards:2", "dirichlet:0.1", "dirichlet:0.5")


def _common(workers: int, partition: str) -> dict[str, Any]:
    setting = {"data": "fashion-mnist", "model": "mlp", "workers": workers, "partition": partition}
    # Evaluations every two rounds of all workers: between the classes of two rounds the accuracy swings.
    return {**setting, "compute": "exponential:1.0", "batch": 32, "epochs": 2, "eval_updates": 125}


CELLS = [
    Cell(f"fashion-mnist, mlp, {partition}, P={workers}", _common(workers, partition), METHODS, GRID)
    for workers in (10, 30)
    for partition in PARTITIONS
]
QUICK = [
    Cell(
        "quick",
        {"data": "digits", "model": "mlp", "workers": 5, "partition": "shards:2", "batch": 16, "epochs": 2,
         "compute": "exponential:1.0", "eval_updates": 20},
        {"asgd": METHODS["asgd"], "gsgm, mu 0.5": METHODS["gsgm, mu 0.5"]},
        (0.05, 0.2),
    )
]  # fmt: skip


def claims(table: dict[str, dict[str, Summary]]) -> list[tuple[str, bool, str]]:
    """Each Show line, cell by cell: the best GSGM by accuracy against each rival."""
    lines = []
    for cell, methods in table.items():
        ours = max((s for m, s in methods.items() if m.startswith("gsgm")), key=lambda s: s.mean("accuracy"))
        for rival in RIVALS:
            if rival not in methods:
                continue
            theirs = methods[rival]
            for measure in ("unrest", "jump"):
                a, b = ours.mean(measure), theirs.mean(measure)
                lines.append((f"{cell}: {ours.method} {measure} at least 20 % below {rival}", a <= 0.8 * b, f"{a:.2f}, {b:.2f}"))
        accuracy = ours.mean("accuracy")
        best = max(methods[r].mean("accuracy") for r in RIVALS if r in methods)
        lines.append((f"{cell}: {ours.method} accuracy above every rival", accuracy > best, f"{accuracy:.2f}, {best:.2f}"))
        lines.append((f"{cell}: {ours.method} never diverges", ours.diverged == 0, f"{ours.diverged} seeds"))
    return lines


if __name__ == "__main__":
    main("gsgm", CELLS, QUICK, claims)
