"""APAM: accuracy and speed-up over P against synchronous AMSGrad, and what an artificial delay does.

Claims (ALGORITHMS.md, section 4): speed-up over P at unchanged accuracy against synchronous AMSGrad with the same global batch;
a delay up to 20 is harmless and 400 still converges; asynchronous non-adaptive SGD does worse.

LeNet-5 on MNIST: every gradient of an asynchronous worker is of 40 samples; a synchronous step is of 40 samples too, 40 / P per
worker. Virtual seconds: a gradient of b samples takes 0.45 + 0.08 b milliseconds (LeNet-5 on one core of the machine that
docs/results.md names), lognormal with sigma 0.3; the network moves 10 GB/s with 20 us latency; the store applies 10 GB/s.
The delay: one worker on the small perceptron, gradients of one of the last N + 1 versions (``simulate --delay N``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _pictures import panels
from _recipe import SMALL, Cell, Line, Table, above, main

WORKERS = (1, 4, 10, 20)
DELAYS = (0, 5, 20, 50, 100, 200, 400)
GLOBAL_BATCH = 40
GRID = (6.4e-5, 1.6e-4, 4e-4, 1e-3, 2.5e-3, 6.25e-3)
OURS, SYNC = "apam", "sync amsgrad"
# The grid in each method's unit: momentum's steps are 10 times as long as sgd's.
RIVALS: dict[str, Any] = {
    "asgd": {"rule": "asgd", "base": "sgd", "scale": 50},
    "asgd momentum": {"rule": "asgd", "base": "momentum", "scale": 5},
}
ASYNC: dict[str, Any] = {OURS: {"rule": "apam"}, **RIVALS}


def _seconds(batch: int) -> str:
    return f"lognormal:{0.45 + 0.08 * batch:.2f}ms,0.3"


def _machine(workers: int) -> dict[str, Any]:
    return {"workers": workers, "network": "20us,10GB/s"}


def _scaling(workers: int, samples: int = 4800, epochs: int = 3) -> Cell:
    data = {"data": "mnist", "samples": samples, "test_samples": 3000, "model": "lenet5", "epochs": epochs}
    share = GLOBAL_BATCH // workers
    methods = {
        m: {**keys, "batch": GLOBAL_BATCH, "compute": _seconds(GLOBAL_BATCH), "service": "10GB/s"} for m, keys in ASYNC.items()
    }
    methods[SYNC] = {"mode": "sync", "base": "amsgrad", "batch": share, "compute": _seconds(share)}
    if samples == 4800:
        return Cell(f"mnist, lenet5, P={workers}", {**data, **_machine(workers)}, methods, GRID)
    few = {m: methods[m] for m in (OURS, SYNC)}
    return Cell(
        f"{samples * epochs // GLOBAL_BATCH} updates, mnist, lenet5, P={workers}", {**data, **_machine(workers)}, few, GRID
    )


def _delay(delay: int, epochs: int = 4) -> Cell:
    data = {
        "data": "mnist",
        "samples": 12000,
        "test_samples": 3000,
        "model": SMALL,
        "epochs": epochs,
        "eval_updates": 30 * epochs,
    }
    common = {**data, "eval_every": 99, "workers": 1, "batch": GLOBAL_BATCH, "delay": delay}
    name = "mnist, small" if epochs == 4 else f"{epochs} epochs, mnist, small"
    return Cell(f"{name}, delay {delay}", common, ASYNC, GRID if epochs == 4 else GRID[:4])


CELLS = [
    *(_delay(d) for d in DELAYS),
    *(_delay(d, 16) for d in (100, 400)),
    *(_scaling(p) for p in (10, 1, 20, 4)),
    *(_scaling(p, 12000, 4) for p in (1, 10, 20)),
]
_TOY = {"data": "digits", "samples": 640, "model": "mlp", "epochs": 2}
QUICK = [
    Cell(f"mnist, lenet5, P={p}", {**_TOY, **_machine(p)}, {
        OURS: {**ASYNC[OURS], "batch": 16, "compute": _seconds(16)},
        SYNC: {"mode": "sync", "base": "amsgrad", "batch": 16 // p, "compute": _seconds(16 // p)},
    }, (2e-3,))
    for p in (1, 4)
]  # fmt: skip


def claims(table: Table) -> list[Line]:
    """Each Show line, for every P and every delay."""
    lines: list[Line] = []
    fresh = table.get("mnist, small, delay 0")
    for cell, methods in table.items():
        ours = methods[OURS]
        if SYNC in methods:
            alone = table.get(f"{cell.rpartition('P=')[0]}P=1")
            if alone is not None and methods is not alone:
                lines.append(above(f"{cell}: accuracy at most 0.2 points below P=1", ours, alone[OURS], less=0.2))
                a, b = (alone[m].mean("seconds") / methods[m].mean("seconds") for m in (OURS, SYNC))
                lines.append((f"{cell}: speed-up above sync amsgrad's", a > b, f"{a:.1f} against {b:.1f}"))
            lines.append(above(f"{cell}: accuracy at most 0.2 points below sync amsgrad", ours, methods[SYNC], less=0.2))
        elif fresh is not None and methods is not fresh:
            if int(cell.rpartition(" ")[2]) <= 20:
                lines.append(above(f"{cell}: harmless (at most 0.2 points)", ours, fresh[OURS], less=0.2))
            lines.append((f"{cell}: converges on every seed", min(ours.accuracy) > 80, f"least {min(ours.accuracy):.2f} %"))
        lines += [above(f"{cell}: accuracy above {m}", ours, methods[m]) for m in RIVALS if m in methods]
    return lines


def extra(table: Table, cells: Sequence[Cell], folder: Path) -> str:
    """Accuracy, virtual seconds and speed-up over P; accuracy over the delay; a picture of each."""
    speed: dict[str, list[tuple[float, float, float]]] = {}
    accuracy: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    head = ["| updates | P | method | test accuracy, % | virtual seconds | speed-up | staleness |", "|---" * 7 + "|"]
    rows: list[tuple[int, int, str]] = []
    for cell in cells:
        if cell.name not in table:
            continue
        delayed = "delay" in cell.common
        if delayed and cell.common["epochs"] != 4:
            continue
        x = 1 + int(cell.common["delay"]) if delayed else int(cell.common["workers"])
        for m, s in table[cell.name].items():
            panel = "small perceptron, one worker, by 1 + delay" if delayed else "LeNet-5, by workers"
            alone = table.get(f"{cell.name.rpartition('P=')[0]}P=1")
            if not cell.name[0].isdigit():
                accuracy.setdefault(panel, {}).setdefault(m, []).append((x, s.mean("accuracy"), s.spread("accuracy")))
            if delayed or alone is None:
                continue
            mean = alone[m].mean("seconds") / s.mean("seconds")
            updates = cell.common["samples"] * cell.common["epochs"] // GLOBAL_BATCH
            if not cell.name[0].isdigit():
                speed.setdefault(m, []).append((x, mean, 0.0))
            row = (f"{updates}", f"{x}", m, f"{s.mean('accuracy'):.2f} ± {s.spread('accuracy'):.2f}", f"{s.mean('seconds'):.3f}")
            rows.append((updates, x, f"| {' | '.join(row)} | {mean:.1f} | {s.mean('staleness'):.1f} |"))
    panels(folder / "accuracy.png", accuracy, "workers, or 1 + artificial delay", span=60)
    if speed:
        ideal = [(x, x, 0.0) for x, _, _ in speed[OURS]]
        panels(
            folder / "speedup.png",
            {"speed-up over P = 1": {OURS: speed[OURS], SYNC: speed.get(SYNC, []), "ideal": ideal}},
            "workers",
            "speed-up",
            span=None,
            log=False,
        )
    delays = sorted({int(x) - 1 for x, _, _ in accuracy.get("small perceptron, one worker, by 1 + delay", {}).get(OURS, [])})
    by_delay = [f"| delay | {' | '.join(map(str, delays))} |", "|---" * (1 + len(delays)) + "|"]
    for m, points in accuracy.get("small perceptron, one worker, by 1 + delay", {}).items():
        at = {int(x) - 1: f"{mean:.2f} ± {sd:.2f}" for x, mean, sd in points}
        by_delay.append(f"| {m} | {' | '.join(at[d] for d in delays)} |")
    if not delays:
        by_delay = []
    return "\n".join([*head, *(text for *_, text in sorted(rows, key=lambda r: r[:2]))]) + "\n\n" + "\n".join(by_delay)


if __name__ == "__main__":
    main("apam", CELLS, QUICK, claims, extra)
