"""What the folder of a run holds, finished or not."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.errors import UsageError, damaged
from hpcasync.train.record_file import FOLDER, RankRecord, read_rank
from hpcasync.train.records import CURVES
from hpcasync.train.step_log import unfinished


@dataclass
class Run:
    """One run as it was found.

    Attributes:
        folder: of it.
        config: resolved.
        result: what ``--json`` printed; empty while the run is not finished.
        environment: versions and machine.
        curves: by ``CURVES``, one entry per evaluation.
        ranks: the columns of ``ranks/`` in ``run.h5``; empty while the run is not finished.
        records: of the ranks that have one.
        missing: sentences about what is not there.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    records: list[RankRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> str:
        """The configuration but for seed and folder: runs that share it are one band."""
        same = {k: v for k, v in self.config.items() if k not in ("seed", "output", "resume")}
        return json.dumps(same, sort_keys=True, default=str)


def read_run(folder: Path) -> Run:
    """Read whatever there is: a crashed or running run has no ``run.h5``, but its evaluations so far.

    Raises:
        UsageError: no such folder, no run in it, or a damaged file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected that of a run")
    if not any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "run.h5", FOLDER)):
        raise UsageError(f"{folder} holds no run (config.toml, metrics.jsonl, run.h5); give the --output of one")
    run = Run(folder)
    if (folder / "run.h5").exists():
        _read_finished(run)
    else:
        _read_unfinished(run)
    if not len(run.curves["epoch"]):
        run.missing.append("no evaluation yet: no learning curves")
    for path in sorted((folder / FOLDER).glob("rank-*.h5")):
        try:
            run.records.append(read_rank(path, int(path.stem.removeprefix("rank-"))))
        except (UsageError, ValueError) as error:
            run.missing.append(f"a record is left out: {error}")
    if not run.records:
        run.missing.append("no record (train --record): no order of updates")
    return run


def _read_finished(run: Run) -> None:
    import h5py

    path = run.folder / "run.h5"
    with unfinished(path), h5py.File(path, "r") as file:
        run.config, run.result = json.loads(file.attrs["config"]), json.loads(file.attrs["result"])
        run.environment = json.loads(file.attrs["environment"])
        run.curves = {name: file[f"curves/{name}"][:] for name in CURVES}
        run.ranks = {name: values[:] for name, values in file["ranks"].items()}


def _read_unfinished(run: Run) -> None:
    run.missing.append("no run.h5: the run is at work, or was cut short; no times and no staleness of its ranks")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    config, metrics = run.folder / "config.toml", run.folder / "metrics.jsonl"
    if config.exists():
        with damaged(f"{config}: can't be read as TOML", "remove the run"):
            run.config = tomllib.loads(config.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    if metrics.exists():
        lines = metrics.read_bytes().split(b"\n")
        with damaged(f"{metrics}: can't be read as JSON lines", "remove the run"):
            rows = [json.loads(line) for line in lines[:-1]]  # the last one may be half written
            run.curves = {n: np.array([np.nan if r[n] is None else r[n] for r in rows], np.float64) for n in CURVES}
    else:
        run.curves = {name: np.empty(0) for name in CURVES}
