"""Trend-Smooth against sequential SGD, ASGD and its relatives, and the ablation of its variants.

Claims (ALGORITHMS.md, section 1): accuracy above ASGD and at most 0.2 points below sequential SGD, less unrest and a faster
loss per update than ASGD, each method at its own best learning rate from one grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from _recipe import SMALL, Cell, Line, Table, above, below, main

# Exponential compute times give every worker the same speed and a wide spread of staleness (mean P-1, long tail). 12 288 samples
# are 384 batches: a whole number of steps for every P. Early epochs: that is where the learning rates of the methods differ.
RUN = {"samples": 12288, "compute": "exponential:1.0", "batch": 32, "epochs": 3, "eval_updates": 120, "eval_every": 99}
LIVE = {**RUN, "test_samples": 3000}
GRIDS = {
    "sgd": (0.008, 0.02, 0.05, 0.125, 0.3),
    "momentum": (0.0008, 0.002, 0.005, 0.0125, 0.03),
    "rmsprop": (2e-4, 5e-4, 1.25e-3, 3e-3, 7.5e-3),
    "adam": (2e-4, 5e-4, 1.25e-3, 3e-3, 7.5e-3),
}
WORKERS = (16, 32, 8, 4)
DEFAULT = "trend-smooth"
CORE: dict[str, Any] = {
    "sequential": {"workers": 1, "rule": "plain"},
    "asgd": {"rule": "asgd"},
    DEFAULT: {"rule": "trend-smooth", "variant": "consistency"},
}
OPPOSED: dict[str, Any] = {"opposed, shrink 0.5": {"rule": "trend-smooth", "variant": "opposed", "shrink": 0.5}}
# Rivals also try one option of their own beside its default; staleness-aware divides its rate by a staleness of about P.
RIVALS: dict[str, Any] = {
    "dc-asgd": [{"rule": "dc-asgd"}, {"rule": "dc-asgd", "adaptive": True}],
    "staleness-aware": [{"rule": "staleness-aware"}, {"rule": "staleness-aware", "scale": 8}],
    "easgd": [{"rule": "easgd"}, {"rule": "easgd", "period": 1}, {"rule": "easgd", "period": 1, "moving_rate": 0.3}],
}
ABLATION: dict[str, Any] = {
    "asgd": {"rule": "asgd"},
    "consistency, floor 0.02": {"rule": "trend-smooth", "variant": "consistency"},
    "consistency, floor 0.1": {"rule": "trend-smooth", "variant": "consistency", "floor": 0.1},
    "consistency, beta 0.9": {"rule": "trend-smooth", "variant": "consistency", "beta": 0.9},
    "consistency, masked": {"rule": "trend-smooth", "variant": "consistency", "masked": True},
    "opposed, shrink 0.5": {"rule": "trend-smooth", "variant": "opposed", "shrink": 0.5},
    "opposed, shrink 0.1": {"rule": "trend-smooth", "variant": "opposed", "shrink": 0.1},
    "opposed, shrink 0.1, beta 0.9, masked": {
        "rule": "trend-smooth", "variant": "opposed", "shrink": 0.1, "beta": 0.9, "masked": True,
    },
    "opposed, shrink by staleness": {"rule": "trend-smooth", "variant": "opposed", "shrink": "staleness"},
    "opposed-strength": {"rule": "trend-smooth", "variant": "opposed-strength"},
    "rate": {"rule": "trend-smooth", "variant": "rate"},
}  # fmt: skip


def _with_base(methods: dict[str, Any], base: str) -> dict[str, Any]:
    def one(keys: Any) -> Any:
        return {**keys, "base": base} if isinstance(keys, dict) else [{**k, "base": base} for k in keys]

    return {name: one(keys) for name, keys in methods.items()}


def _cell(data: str, model: str, base: str, workers: int, methods: dict[str, Any], **more: Any) -> Cell:
    common = {"data": data, "model": SMALL if model == "small" else model, "workers": workers, **LIVE, **more}
    place = (f"{data}, {model}, {base}", workers)
    return Cell(f"{data}, {model}, {base}, P={workers}", common, _with_base(methods, base), GRIDS[base], place)


def _long(base: str, workers: int, longer: dict[str, Any]) -> Cell:
    cell = _cell("fashion-mnist", "small", base, workers, CORE | OPPOSED, **longer)
    return replace(cell, name=f"12 epochs, {cell.name}", place=(f"{cell.place[0]}, 12 epochs", workers))


def _cells() -> list[Cell]:
    """The ablation; then every base at P = 16 with all rivals; then the other P and MNIST; 12 epochs; LeNet-5."""
    common = {"data": "fashion-mnist", "model": "mlp", "workers": 16, **RUN}
    cells = [Cell("ablation, fashion-mnist, mlp, sgd, P=16", common, _with_base(ABLATION, "sgd"), GRIDS["sgd"])]
    cells += [_cell("fashion-mnist", "small", base, 16, CORE | OPPOSED | RIVALS) for base in GRIDS]
    cells += [_cell("fashion-mnist", "small", base, workers, CORE | OPPOSED) for workers in WORKERS[1:] for base in GRIDS]
    cells += [_cell("mnist", "small", base, workers, CORE | OPPOSED) for workers in WORKERS for base in GRIDS]
    # Where the default does not hold its claims in 3 epochs: 12.
    longer = {"epochs": 12, "eval_updates": 480}
    cells += [_long(base, workers, longer) for base in ("sgd", "rmsprop") for workers in (32, 16)]
    short = {"epochs": 2, "eval_updates": 192}
    order = [(b, p) for p in WORKERS for b in ("sgd", "momentum", "adam", "rmsprop")]
    cells.append(_cell("fashion-mnist", "lenet5", "momentum", 16, CORE | RIVALS, **short))
    rest = [(data, b, p) for b, p in order for data in ("fashion-mnist", "mnist")]
    rest.remove(("fashion-mnist", "momentum", 16))
    cells += [_cell(data, "lenet5", b, p, CORE, **short) for data, b, p in rest]
    return cells


QUICK = [
    Cell(
        "quick",
        {"data": "digits", "samples": 640, "model": "mlp", "workers": 4, "compute": "exponential:1.0", "batch": 16, "epochs": 2,
         "eval_updates": 20},
        _with_base(CORE | {"dc-asgd": RIVALS["dc-asgd"]}, "sgd"),
        (0.05, 0.2),
        ("digits", 4),
    )
]  # fmt: skip


def claims(table: Table) -> list[Line]:
    """Each Show line, cell by cell, for the default variant."""
    lines = []
    for cell, methods in table.items():
        if not CORE.keys() <= methods.keys():
            continue
        ours, asgd, alone = (methods[m] for m in (DEFAULT, "asgd", "sequential"))
        lines.append(above(f"{cell}: accuracy above ASGD", ours, asgd))
        lines.append(above(f"{cell}: at most 0.2 points below sequential", ours, alone, less=0.2))
        lines.append(below(f"{cell}: less unrest than ASGD", ours, asgd, "unrest"))
        lines.append(below(f"{cell}: faster training loss than ASGD", ours, asgd, "area"))
        for rival in RIVALS:
            if rival in methods:
                lines.append(above(f"{cell}: accuracy above {rival}", ours, methods[rival]))
    return lines


if __name__ == "__main__":
    main("trend_smooth", _cells(), QUICK, claims)
