"""Runs of the recipes: one JSON file per run, named by a hash of its keys, several at a time; what is there is not run again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _data
import _pools

Keys = Mapping[str, Any]
"""Keys of ``hpcasync simulate``, and ``samples``, ``test_samples``: use so many of the data set only, its first; or ``pool``:
``data`` is one of ``_pools``, cut by the seed, and this the part of it."""
Run = dict[str, Any]
"""A finished run: its ``keys``, ``result`` (of ``--json``) and ``curve`` (a row per evaluation)."""


def name_of(keys: Keys) -> str:
    """The name of the run with these keys."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


class Runner:
    """Simulates what has no file yet.

    Args:
        folder: of the files.
        processes: at a time; 1 stays in this process.
        minutes: after which no further run is started.
    """

    def __init__(self, folder: Path, processes: int, minutes: float) -> None:
        self.folder, self.processes = folder, processes
        self.end = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, wanted: Sequence[Keys]) -> list[Run] | None:
        """The runs with these keys, in order; None when the time is up before all are there."""
        files = [self.folder / f"{name_of(keys)}.json" for keys in wanted]
        todo = {f: (keys, f, self.end) for keys, f in zip(wanted, files, strict=True) if not f.exists()}
        if self.processes == 1:
            for task in todo.values():
                _one(task)
        elif todo:
            with multiprocessing.get_context("spawn").Pool(self.processes) as pool:
                for _ in pool.imap_unordered(_one, todo.values()):
                    pass
        if not all(f.exists() for f in files):
            return None
        return [json.loads(f.read_text()) for f in files]


def _one(task: tuple[Keys, Path, float]) -> None:
    keys, path, end = task
    if time.monotonic() > end:
        return
    import torch

    from hpcasync.data.atomic import replacing
    from hpcasync.simulate.config import make_simulate_config
    from hpcasync.simulate.run import simulate

    torch.set_num_threads(1)
    own = dict(keys)
    samples, test_samples = own.pop("samples", None), own.pop("test_samples", None)
    part = own.pop("pool", None)
    if part is not None:
        own["data"] = str(_pools.cut(own["data"], part, own["seed"]))
    if samples is not None:
        own["data"] = str(_data.cut(own["data"], samples, test_samples))
    if str(own.get("partition", "")).startswith("dirichlet"):
        own["partition"] = _data.deal(own["partition"], own["data"], own["workers"], own["seed"], own["batch"])
    outcome = simulate(make_simulate_config(own), records=False, shown=False)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"keys": dict(keys), "result": outcome.result, "curve": outcome.curve}))
