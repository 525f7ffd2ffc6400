"""Trend-Smooth against sequential SGD, ASGD and its relatives, and the ablation of its variants.

Claims (ALGORITHMS.md, section 1): accuracy above ASGD and at most 0.2 points below sequential SGD, less unrest and a faster
loss per update than ASGD, each method at its own best learning rate from one grid.
"""

from __future__ import annotations

from typing import Any

from _recipe import Cell, Summary, main

# Exponential compute times give every worker the same speed and a wide spread of staleness (mean P-1, long tail).
LIVE = {"compute": "exponential:1.0", "batch": 32, "epochs": 2, "eval_updates": 250}
GRIDS = {
    "sgd": (0.025, 0.05, 0.1, 0.2, 0.4),
    "momentum": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "rmsprop": (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3),
    "adam": (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3),
}
SEQUENTIAL = {"workers": 1, "rule": "plain"}
MAIN: dict[str, dict[str, Any]] = {
    "sequential": SEQUENTIAL,
    "asgd": {"rule": "asgd"},
    "trend-smooth consistency": {"rule": "trend-smooth", "variant": "consistency"},
    "trend-smooth opposed-strength": {"rule": "trend-smooth", "variant": "opposed-strength"},
    "trend-smooth rate": {"rule": "trend-smooth", "variant": "rate"},
    "dc-asgd": {"rule": "dc-asgd"},
    "staleness-aware": {"rule": "staleness-aware"},
    "easgd": {"rule": "easgd"},
}
ABLATION: dict[str, dict[str, Any]] = {
    "asgd": {"rule": "asgd"},
    "consistency, floor 0.02": {"rule": "trend-smooth", "variant": "consistency"},
    "consistency, floor 0.1": {"rule": "trend-smooth", "variant": "consistency", "floor": 0.1},
    "consistency, beta 0.9": {"rule": "trend-smooth", "variant": "consistency", "beta": 0.9},
    "consistency, masked": {"rule": "trend-smooth", "variant": "consistency", "masked": True},
    "opposed, shrink 0.5": {"rule": "trend-smooth", "variant": "opposed", "shrink": 0.5},
    "opposed, shrink 0.1, beta 0.9, masked": {
        "rule": "trend-smooth", "variant": "opposed", "shrink": 0.1, "beta": 0.9, "masked": True,
    },
    "opposed, shrink by staleness": {"rule": "trend-smooth", "variant": "opposed", "shrink": "staleness"},
    "opposed-strength": {"rule": "trend-smooth", "variant": "opposed-strength"},
    "rate": {"rule": "trend-smooth", "variant": "rate"},
}  # fmt: skip


def _with_base(methods: dict[str, dict[str, Any]], base: str) -> dict[str, dict[str, Any]]:
    # EASGD has local steps of its own: sgd, or momentum in its EAMSGD form.
    return {
        name: {**keys, "base": base}
        for name, keys in methods.items()
        if name != "easgd" or base == "sgd"
    }


def _cells() -> list[Cell]:
    cells = [
        Cell("ablation, fashion-mnist, mlp, sgd, P=16", _common("fashion-mnist", 16), _with_base(ABLATION, "sgd"), GRIDS["sgd"])
    ]
    for base in GRIDS:
        for data in ("fashion-mnist", "mnist"):
            for workers in (16, 4, 8, 32):
                name = f"{data}, mlp, {base}, P={workers}"
                cells.append(Cell(name, _common(data, workers), _with_base(MAIN, base), GRIDS[base]))
    return cells


def _common(data: str, workers: int) -> dict[str, Any]:
    return {"data": data, "model": "mlp", "workers": workers, **LIVE}


QUICK = [
    Cell(
        "quick",
        {"data": "digits", "model": "mlp", "workers": 4, "compute": "exponential:1.0", "batch": 16, "epochs": 2},
        _with_base({k: MAIN[k] for k in ("sequential", "asgd", "trend-smooth consistency")}, "sgd"),
        (0.05, 0.2),
    )
]


def claims(table: dict[str, dict[str, Summary]]) -> list[tuple[str, bool, str]]:
    """Each Show line, cell by cell, for the default variant."""
    lines = []
    for cell, methods in table.items():
        if not {"asgd", "sequential", "trend-smooth consistency"} <= methods.keys():
            continue
        ours, asgd, alone = (methods[m] for m in ("trend-smooth consistency", "asgd", "sequential"))
        a, b, c = (s.mean("accuracy") for s in (ours, asgd, alone))
        lines.append((f"{cell}: accuracy above ASGD", a > b, f"{a:.2f} against {b:.2f}"))
        lines.append((f"{cell}: at most 0.2 points below sequential", a >= c - 0.2, f"{a:.2f} against {c:.2f}"))
        u, v = ours.mean("unrest"), asgd.mean("unrest")
        lines.append((f"{cell}: less unrest than ASGD", u < v, f"{u:.2f} against {v:.2f}"))
        u, v = ours.mean("area"), asgd.mean("area")
        lines.append((f"{cell}: faster training loss than ASGD", u < v, f"mean loss {u:.3f} against {v:.3f}"))
    return lines


if __name__ == "__main__":
    main("trend_smooth", _cells(), QUICK, claims)
