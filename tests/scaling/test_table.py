from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpcasync.errors import UsageError
from hpcasync.scaling.table import COLUMNS, markdown, read_rows, tabulate, write_table


def trained(lr: float, seconds: float, epochs: float) -> dict:
    return {"lr": lr, "to_target": seconds, "epochs_to_target": epochs, "accuracy": 0.9}


def row(kind: str, what: str, ranks: int, batch: int, speed: float, **more: Any) -> dict:
    share = {"compute": 0.5, "communicate": 0.3, "wait": 0.2}
    return {"kind": kind, "what": what, "ranks": ranks, "nodes": 1, "batch": batch, "samples_per_second": speed, "own": 2 * speed,
            "staleness": 1.5, **share, **more}  # fmt: skip


ROWS = [
    *(row("weak", "torch", 1, 32, speed) for speed in (90.0, 100.0, 110.0)),
    *(row("weak", "sync", 4, 32, speed) for speed in (190.0, 200.0, 400.0)),
    row("strong", "torch", 1, 128, 300.0),
    row("strong", "async:asgd", 4, 32, 600.0, trainings=[trained(0.1, 2.5, 1.25), trained(0.2, 2.0, 1.0)]),
    row("strong", "async:asgd", 4, 32, 600.0, trainings=[trained(0.1, 3.5, 1.75), trained(0.2, math.nan, math.nan)]),
    row("strong", "async:asgd", 4, 32, 600.0, trainings=[trained(0.1, math.nan, math.nan), trained(0.2, math.nan, math.nan)]),
]


def test_medians_and_efficiencies_by_hand() -> None:
    lines = {(line["kind"], line["what"]): line for line in tabulate(ROWS)}
    weak, strong = lines["weak", "sync"], lines["strong", "async:asgd"]
    assert (weak["samples_per_second"], weak["low"], weak["high"], weak["rounds"]) == (200.0, 190.0, 400.0, 3)
    assert weak["efficiency"] == pytest.approx(200 / (4 * 100))
    assert strong["efficiency"] == pytest.approx(600 / (4 * 300)), "against the whole batch of 128"
    # At rate 0.2 most have not come to the target; at 0.1 the median of 2.5, 3.5 and never.
    assert [strong[k] for k in ("lr", "to_target", "epochs_to_target", "reached")] == [0.1, 3.5, 1.75, "2 of 3"]
    assert weak["reached"] == "" and "| 0.1 | 3.5 | 1.75 | 2 of 3 |" in markdown(list(lines.values()))
    assert "target" not in markdown([weak])
    assert [line["what"] for line in tabulate(ROWS)] == ["torch", "sync", "torch", "async:asgd"]


def test_other_settings_are_other_cases(tmp_path: Path) -> None:
    for number, model in enumerate(("mlp", "logistic")):
        rows = [row("weak", "torch", 1, 32, 10.0 * 10**number), row("weak", "sync", 1, 32, 5.0 * 10**number)]
        measured = {"rows": rows, "settings": {"model": model, "data": "digits", "slow": []}}
        (tmp_path / f"ranks-1-nodes-1-{number}.json").write_text(json.dumps(measured))
    lines = tabulate(read_rows(tmp_path))
    assert [line["what"] for line in lines] == [
        "torch, model logistic", "torch, model mlp", "sync, model logistic", "sync, model mlp",
    ]  # fmt: skip
    assert [line["efficiency"] for line in lines] == [1, 1, 0.5, 0.5]


def test_an_interval_needs_six_rounds() -> None:
    few, many = (tabulate([row("weak", "sync", 2, 32, 5.0)] * n) for n in (5, 6))
    assert "| lowest - highest |" in markdown(few) and "| 95 % interval |" in markdown(many)
    assert "| 95 % interval, below 6 rounds lowest - highest |" in markdown(few + many)


def test_no_base_no_efficiency() -> None:
    (line,) = tabulate([row("weak", "sync", 2, 32, 5.0)])
    assert math.isnan(line["efficiency"])
    assert "| - |" in markdown([line])


def test_files(tmp_path: Path) -> None:
    for number, part in enumerate((ROWS[:3], ROWS[3:])):
        (tmp_path / f"ranks-1-nodes-1-{number}.json").write_text(json.dumps({"rows": part}))
    lines = tabulate(read_rows(tmp_path))
    paths = write_table(lines, tmp_path)
    assert [p.suffix for p in paths] == [".csv", ".md", ".png"] and all(p.stat().st_size for p in paths)
    with paths[0].open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(COLUMNS) and float(found[1]["efficiency"]) == pytest.approx(0.5)


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": [{"kind": "weak"}]}', '{"rows": 3}'])
def test_no_measurement_or_a_damaged_one(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ranks-1-nodes-1-x.json").write_text(content)
    with pytest.raises(UsageError, match=r"measure|make one"):
        read_rows(tmp_path)
