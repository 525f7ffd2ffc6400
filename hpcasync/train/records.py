"""The folder of a run: configuration, one JSON line per evaluation, one HDF5 file, and the final result."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcasync.comm import World
from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError
from hpcasync.train.checkpoint_folder import checkpoints
from hpcasync.train.config import TrainConfig, write_config
from hpcasync.train.inside import INSIDE
from hpcasync.train.lock import RunLock
from hpcasync.train.step_log import unfinished, write_steps

FORMAT, VERSION = "hpcasync-run", 1
CURVES = ("epoch", "updates", "seconds", "train_loss", "test_loss", "test_accuracy")
"""Columns of ``curves/`` in the run file, one entry per evaluation."""
SAMPLES = "samples"
"""A column of ``curves/`` that a run of an earlier version has not: trained on by all ranks so far."""
RANK_COLUMNS = ("seconds", "compute", "communicate", "wait", "samples", "updates", "skipped")
"""Columns of ``ranks/`` in the run file, one entry per rank; beside them ``staleness`` (ranks, counts), in mode async
``discarded``, with the model on a GPU ``copy``."""


class RunFolder:
    """Writes a run's records; only rank 0 has one.

    Files: ``config.toml`` (resolved), ``metrics.jsonl`` (a line per evaluation, as it happens), ``run.h5`` and
    ``result.json`` (at the end; never half a file under these names). Beside them lie the checkpoints.

    Args:
        config: of the run; ``output`` None means ``runs/<time>-<name>``. With ``resume`` nothing is written before
            ``begin``.

    Attributes:
        path: the folder.
        lock: what keeps other runs out of it, until ``close``.
        rows: the evaluations so far.

    Raises:
        UsageError: the folder can't be made or written, holds a run already, or one is at work there.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = _make_folder(config)
        self.lock = RunLock(self.path)
        self.rows: list[dict[str, Any]] = []
        self._written = 0  # so many of them are in the file
        self._warned = False
        self._config = config
        if config.resume is None:
            try:
                self.begin([])
            except BaseException:
                self.close()  # nobody else can: there is no RunFolder
                raise

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Write the configuration, and go on after ``rows``: later ones are of a run that was cut short."""
        self.rows, self._written = list(rows), len(rows)
        write_config(self._config, self.path / "config.toml")
        metrics = self.path / "metrics.jsonl"
        if rows or metrics.exists():
            with replacing(metrics) as temporary:
                temporary.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")

    def close(self) -> None:
        """Let other runs in. Idempotent."""
        self.lock.release()

    def add(self, row: dict[str, Any]) -> None:
        """Record one evaluation. Of an epoch that has one it is left out: the meeting was begun again after a rank's death.

        A disk that is full now need not be so later: there is one warning, and the line is written with the next one.
        """
        if self.rows and self.rows[-1]["epoch"] == row["epoch"]:
            return
        self.rows.append(row)
        try:
            self._write_rows()
            self._warned = False
        except UsageError as error:
            if not self._warned:
                print(f"hpcasync: warning: {error}. The run goes on and tries again", file=sys.stderr, flush=True)
            self._warned = True

    def _write_rows(self) -> None:
        """Append those that are not in the file, no part of a line."""
        path = self.path / "metrics.jsonl"
        lines = "".join(to_json(row) + "\n" for row in self.rows[self._written :]).encode()
        try:
            with open(path, "ab", buffering=0) as file:
                before = file.tell()
                if file.write(lines) < len(lines):
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UsageError(f"can't write {path}: {error.strerror}") from error
        self._written = len(self.rows)

    def finish(self, result: dict[str, Any], ranks: list[dict[str, Any]], config: TrainConfig, world: World) -> None:
        """Write ``run.h5`` and ``result.json``.

        Args:
            result: what ``--json`` prints.
            ranks: per rank ``seconds``, ``compute``, ``communicate``, ``wait`` (seconds), ``samples``, ``updates``,
                ``skipped``, ``staleness`` (histogram counts), in mode async ``discarded``, of a GPU ``copy`` (seconds); of a
                live run also what ``StepLog.record`` gives.
            config: of the run.
            world: for the versions.

        Raises:
            UsageError: one of the files can't be written.
        """
        import h5py

        if self._written < len(self.rows):
            self._write_rows()
        image = io.BytesIO()  # HDF5 itself can't report a full disk cleanly: it fails again while closing
        with h5py.File(image, "w") as file:
            file.attrs.update({"format": FORMAT, "version": VERSION, "config": json.dumps(config.keys())})
            file.attrs.update({"result": to_json(result), "environment": json.dumps(environment(world))})
            for name in CURVES:
                file[f"curves/{name}"] = np.array([row[name] for row in self.rows], np.float64)
            file[f"curves/{SAMPLES}"] = samples_of(self.rows)
            for name, (columns, values) in inside_tables(self.rows).items():
                file[f"inside/{name}"] = values
                file[f"inside/{name}"].attrs["columns"] = json.dumps(columns)
            file["ranks/rank"] = np.array([rank.get("rank", i) for i, rank in enumerate(ranks)])  # others have died
            for name in RANK_COLUMNS:
                file[f"ranks/{name}"] = np.array([rank[name] for rank in ranks])
            if any("copy" in rank for rank in ranks):
                file["ranks/copy"] = np.array([rank.get("copy", 0.0) for rank in ranks])
            if "discarded" in ranks[0]:
                file["ranks/discarded"] = np.array([rank["discarded"] for rank in ranks])
            widest = max(len(rank["staleness"]) for rank in ranks)
            counts = [np.pad(rank["staleness"], (0, widest - len(rank["staleness"]))) for rank in ranks]
            file["ranks/staleness"] = np.array(counts, np.int64)
            if "steps" in ranks[0]:
                write_steps(file, ranks)
        with replacing(self.path / "run.h5") as temporary:
            temporary.write_bytes(image.getbuffer())
        with replacing(self.path / "result.json") as temporary:
            temporary.write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
        self.close()


def samples_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The samples in rows of ``metrics.jsonl``, NaN where there are none: float64 (rows,)."""
    return np.array([row.get(SAMPLES) for row in rows], np.float64)


def inside_tables(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[str], np.ndarray]]:
    """What rows have under ``inside``, by the names of ``INSIDE``: the columns, and float64 (rows, columns), NaN for none."""
    tables = {}
    for name in INSIDE:
        of_rows = [row.get("inside", {}).get(name, {}) for row in rows]
        columns = list(dict.fromkeys(column for numbers in of_rows for column in numbers))
        if columns:
            values = [[numbers.get(column) for column in columns] for numbers in of_rows]
            tables[name] = columns, np.array(values, np.float64)
    return tables


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """Per rank, what ``RunFolder.finish`` was given, from a finished run.

    Raises:
        UsageError: no finished run there.
    """
    import h5py

    path = folder / "run.h5"
    with unfinished(path), h5py.File(path, "r") as file:
        columns = {name: values[:] for name, values in file["ranks"].items()}
        ranks = [{name: values[i] for name, values in columns.items()} for i in range(len(columns["seconds"]))]
        for rank in ranks:
            parts = [k for k in ("compute", "communicate", "wait", "copy") if k in rank]
            total = sum(rank[k] for k in parts)
            rank["share"] = {k: rank[k] / total if total else 0.0 for k in parts}
    return ranks


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run so far; none where the file can't be read."""
    rows = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def to_json(value: dict[str, Any], **options: Any) -> str:
    """Strict JSON: a number that is NaN or infinite becomes null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: plain(v) for k, v in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), allow_nan=False, **options)


def environment(world: World) -> dict[str, str]:
    """Versions and machine, for the record."""
    import torch

    from hpcasync import __version__

    versions = {"hpcasync": __version__, "torch": torch.__version__, "numpy": np.__version__, "mpi": world.library}
    return {**versions, "python": platform.python_version(), "machine": platform.platform(), "host": platform.node()}


def _make_folder(config: TrainConfig) -> Path:
    if config.output is not None:
        path = Path(config.output)
        _make(path)
        used = (path / "result.json").exists() or (path / "metrics.jsonl").exists() or bool(checkpoints(path))
        if used and not _goes_on(config.resume, path):
            raise UsageError(
                f"--output {path} holds a run already; go on with it (--resume auto), choose another folder, or remove that one"
            )
        return path
    stem = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.name}"
    for attempt in range(100):
        path = Path(stem if not attempt else f"{stem}-{attempt + 1}")
        try:  # another job may have the same second
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # _make says why
        _make(path)
        return path
    raise UsageError(f"100 runs named {stem} already; give --output")


def _goes_on(resume: str | None, folder: Path) -> bool:
    """Whether ``resume`` is a checkpoint of the run in ``folder``, or the folder itself."""
    if resume is None or resume == "auto":
        return resume == "auto"
    return folder.resolve() in (Path(resume).resolve(), Path(resume).resolve().parent)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"output folder {path} is not writable: {error.strerror}; give another one with --output"
        ) from error
