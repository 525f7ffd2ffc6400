"""What the folder of a run holds, finished or not."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.errors import UsageError, damaged
from hpcasync.modes.inside import QUANTILES
from hpcasync.report.deaths import death_sentences
from hpcasync.report.from_record import ranks_of_records
from hpcasync.train.checkpoint_folder import checkpoints
from hpcasync.train.lock import holder_of
from hpcasync.train.record_file import FOLDER, RankRecord, read_rank
from hpcasync.train.records import CURVES, SAMPLES, inside_tables, samples_of
from hpcasync.train.step_log import unfinished

FILES = ("config.toml", "metrics.jsonl", "run.h5", FOLDER)
"""Of which a run has at least one from its beginning on."""
NAMES = 5
"""Of files or folders that a sentence lists."""
Table = tuple[list[str], np.ndarray]


@dataclass
class Run:
    """One run as it was found.

    Attributes:
        folder: of it.
        config: resolved.
        result: what ``--json`` printed; empty while the run is not finished.
        environment: versions and machine.
        curves: by ``CURVES`` and ``SAMPLES``, one entry per evaluation.
        inside: by the names of ``hpcasync.train.inside.INSIDE``: columns, and float64 (evaluations, columns).
        ranks: the columns of ``ranks/`` in ``run.h5``, one entry per rank; of a run that is not finished what the records
            tell: ``rank``, ``compute``, ``communicate``, ``wait``, ``staleness``.
        records: of the ranks that have one.
        deaths: sentences about ranks that died while the others went on.
        missing: sentences about what is not there.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=lambda: {name: np.empty(0) for name in (*CURVES, SAMPLES)})
    inside: dict[str, Table] = field(default_factory=dict)
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    records: list[RankRecord] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def simulated(self) -> bool:
        """Whether its seconds are virtual ones."""
        return "workers" in self.config

    @property
    def recipe(self) -> str:
        """The configuration and the ranks, but for seed and folder: runs that share it are one band."""
        given = {k: v for k, v in self.config.items() if v is not None}  # TOML has no None
        same = {k: v for k, v in given.items() if k not in ("seed", "output", "resume")}
        ranks = self.records[0].facts["ranks"] if self.records else self.config.get("workers")
        ranks = self.result.get("ranks", ranks)
        return json.dumps([same, ranks], sort_keys=True, default=str) if same else str(self.folder)


def read_run(folder: Path) -> Run:
    """Read whatever there is: a crashed or running run has no ``run.h5``, but its evaluations so far; one about to begin nothing.

    Raises:
        UsageError: no such folder, or a damaged file.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f"{folder}: {found}; expected the folder of a run, what train was given with --output")
    run, left_out = Run(folder), []
    for path in sorted((folder / FOLDER).glob("rank-*.h5")):
        try:
            found_rank = read_rank(path, int(path.stem.removeprefix("rank-")))
            if run.records and found_rank.facts["run"] != run.records[0].facts["run"]:
                raise UsageError(f"{path} is of another run than {run.records[0].path}")
            run.records.append(found_rank)
        except (UsageError, ValueError) as error:
            left_out.append(f"a record is left out: {error}")
    if (folder / "run.h5").exists():
        _read_finished(run)
    else:
        _read_unfinished(run)
    with damaged(f"{folder}: its tables do not fit together", "one of its files is damaged: copy the run again"):
        _check(run)
        deaths = run.result.get("deaths") or [death for r in run.records if r.rank == 0 for death in r.end.get("deaths", [])]
        starts = [float(r.steps["start"][0]) + r.facts["epoch_of_times"] for r in run.records if len(r.steps)]
        run.deaths = death_sentences(deaths, run.config, min(starts, default=None))
    if not len(run.curves["epoch"]):
        run.missing.append("no evaluation yet: no learning curves; the first comes after --eval-every epochs")
    run.missing += left_out
    if not run.records:
        run.missing.append("no record: no order of updates" + ("" if run.simulated else " (train --record)"))
    return run


def _check(run: Run) -> None:
    """Raise ``ValueError`` unless the tables have the shapes that plots rely on."""
    rows, ranks = len(run.curves["epoch"]), len(run.ranks.get("rank", ()))
    shapes: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {}
    for name, values in run.curves.items():
        shapes[f"curves/{name}"] = values, (rows,)
    for name, (columns, values) in run.inside.items():
        shapes[f"inside/{name}"] = values, (rows, len(QUANTILES) if name == "scores" else len(columns))
        if (name == "scores" and len(columns) != len(QUANTILES)) or not all(isinstance(column, str) for column in columns):
            raise ValueError(f"inside/{name} has the columns {columns}")
    for name, values in run.ranks.items():
        shapes[f"ranks/{name}"] = values, (ranks, *(values.shape[1:2] or (1,))) if name == "staleness" else (ranks,)
    for name, (values, expected) in shapes.items():
        if values.shape != expected or values.dtype.kind not in "iuf":
            raise ValueError(f"{name} has shape {values.shape} and type {values.dtype}, expected {expected} numbers")
    if not all(isinstance(table, dict) for table in (run.config, run.result, run.environment)):
        raise ValueError("configuration, result and environment are no tables")


def _read_finished(run: Run) -> None:
    import h5py

    path = run.folder / "run.h5"
    with unfinished(path), h5py.File(path, "r") as file:
        run.config, run.result = json.loads(file.attrs["config"]), json.loads(file.attrs["result"])
        run.environment = json.loads(file.attrs["environment"])
        run.curves = {name: file[f"curves/{name}"][:] for name in CURVES}
        known = f"curves/{SAMPLES}" in file
        run.curves[SAMPLES] = file[f"curves/{SAMPLES}"][:] if known else np.full(len(run.curves["epoch"]), np.nan)
        run.inside = {n: (json.loads(data.attrs["columns"]), data[:]) for n, data in file.get("inside", {}).items()}
        run.ranks = {name: values[:] for name, values in file["ranks"].items()}
        run.ranks.setdefault("rank", np.arange(len(run.ranks["seconds"])))


def _read_unfinished(run: Run) -> None:
    holder = holder_of(run.folder)
    if holder is not None:
        run.missing.append(f"no run.h5: the run is at work, by its lock ({holder})")
    elif not any((run.folder / name).exists() for name in FILES):
        run.missing.append(f"no run.h5: nothing of a run is here, {_instead(run.folder)}")
    else:
        newest = next(reversed(checkpoints(run.folder)), None)
        how = f"; train --resume auto --output {run.folder} goes on from {newest.name}" if newest else "; it left no checkpoint"
        run.missing.append(f"no run.h5: the run was cut short{how}")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    config, metrics = run.folder / "config.toml", run.folder / "metrics.jsonl"
    if config.exists():
        with damaged(f"{config}: can't be read as TOML", "remove the run"):
            run.config = tomllib.loads(config.read_text(encoding="utf-8"))
    else:
        run.missing.append("no config.toml: no configuration; a run writes it when it begins")
    if metrics.exists():
        with damaged(f"{metrics}: can't be read", "look at its permissions"):
            lines = metrics.read_bytes().split(b"\n")[:-1]  # the last one may be half written
        rows = [row for line in lines if (row := _evaluation(line)) is not None]
        run.curves = {n: np.array([row[n] for row in rows], np.float64) for n in CURVES} | {SAMPLES: samples_of(rows)}
        run.inside = inside_tables(rows)
        if len(rows) < len(lines):
            run.missing.append(f"{len(lines) - len(rows)} of {len(lines)} lines of metrics.jsonl are damaged and left out")
    if run.records:
        run.ranks = ranks_of_records(run.records)
        there = len(run.records), run.records[0].facts["ranks"]
        run.missing.append(
            f"times and staleness are from the record, so far ({there[0]} of {there[1]} ranks)"
            + ("" if "staleness" in run.ranks else "; this mode records no staleness")
        )
    else:
        run.missing.append("no times and no staleness of its ranks: they come with run.h5 at the end, or with a record")


def _instead(folder: Path) -> str:
    """What is in a folder that holds no run, and what to do."""
    with damaged(f"{folder}: can't be listed", "look at its permissions"):
        there = sorted(folder.iterdir())
    below = [path.name for path in there if any((path / name).exists() for name in FILES)]
    if below:
        names = ", ".join(below[:NAMES]) + (", ..." if len(below) > NAMES else "")
        return f"but there are runs in folders of it: give those ({names})"
    others = [path.name for path in there if not path.name.startswith((".", "report"))]
    what = f"only {', '.join(others[:NAMES])}{', ...' if len(others) > NAMES else ''}" if others else "the folder is empty"
    return f"{what}; train --output {folder} puts one there"


def _evaluation(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, None for a damaged one: what a machine leaves that went down may be anything."""
    try:
        row = json.loads(line)
        numbers = [np.array([row[name] for name in CURVES], np.float64), samples_of([row])]
        tables = [values[0] for _, values in inside_tables([row]).values()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return row if all(values.ndim == 1 for values in numbers + tables) else None
