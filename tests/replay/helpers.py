"""Recorded runs: several in one launch, with shards so small that every model has some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcasync.cli import main
from tests.mpi import MpiRun

PROGRAM = """
import json, os, signal, sys
import hpcasync.modes.asynchronous as asynchronous
from hpcasync.cli import main

asynchronous.SHARD_ELEMENTS = 512
step = asynchronous.Async.step

def dying(self, closure=None):
    if self.world.rank == int(os.environ.get("DIES", -1)) and self.steps == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, closure)

asynchronous.Async.step = dying
os.chdir(sys.argv[1])
for name, flags in json.load(open("runs.json")).items():
    common = ["train", "--data", "digits", "--epochs", "1", "--threads", "1", "--record", "--output", name]
    if main([*common, *flags]):
        sys.exit(f"{name} failed")
"""
NORM, FROZEN = ("--model", "tests.replay.nets:norm"), ("--model", "tests.replay.nets:frozen")


def launch(mpirun: MpiRun, runs: Mapping[str, Sequence[str]], ranks: int, **options: Any) -> Any:
    """Train each run under the name of its folder, all in one launch."""
    (mpirun.folder / "runs.json").write_text(json.dumps(runs))
    return mpirun(PROGRAM, ranks, args=[mpirun.folder], timeout=250, **options)


def record(mpirun: MpiRun, runs: Mapping[str, Sequence[str]], ranks: int, **options: Any) -> Path:
    """``launch``; returns the folder of the folders."""
    launch(mpirun, runs, ranks, **options)
    return mpirun.folder


def replay(capsys: Any, *args: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and result of ``hpcasync replay``."""
    capsys.readouterr()
    code = main(["replay", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def changed(run: Path, name: str, rank: int, table: str, row: int, field: str | None, value: Any) -> Path:
    """A copy of a run whose record has another value in one place."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    with h5py.File(copy / f"record/rank-{rank:05d}.h5", "a") as file:
        rows = file[table][:]
        if field is None:
            rows[row] = value
        else:
            rows[field][row] = value
        del file[table]
        file[table] = rows
    return copy


def column(run: Path, rank: int, table: str) -> np.ndarray:
    """A table of a rank's record."""
    with h5py.File(run / f"record/rank-{rank:05d}.h5") as file:
        found: np.ndarray = file[table][:]
    return found
