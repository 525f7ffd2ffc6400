"""What a run goes on from: the checkpoint that ``--resume`` means, and whether it is of this very run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpcasync.data import Dataset
from hpcasync.errors import UsageError
from hpcasync.train.checkpoint_folder import newest_good
from hpcasync.train.config import TrainConfig

FREE = (
    "output", "name", "resume", "checkpoint_every", "keep", "stall_seconds", "eval_every", "device", "threads", "data",
    "progress", "collectives", "epochs", "model", "record", "slow", "live", "tensorboard",
)  # fmt: skip
"""Keys that may be others when a run goes on; data are compared by their checksum, the model by its tensors."""


def find(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. For one rank; a damaged newest one is told on stderr.

    Raises:
        UsageError: there is none under a path that was given, or none that is whole.
    """
    if config.resume is None:
        return None
    folder = Path(str(config.output)) if config.resume == "auto" else Path(config.resume)
    if config.resume != "auto" and not folder.is_dir():
        return folder  # the reader says what is wrong with it
    path, warning = newest_good(folder)
    if warning:
        print(f"hpcasync: warning: {warning}", file=sys.stderr, flush=True)
    if path is None and config.resume != "auto":
        raise UsageError(f"--resume {folder}: the folder holds no checkpoint (checkpoint-*.h5); leave --resume out to start anew")
    return path


def check_run(path: Path, facts: dict[str, Any], config: TrainConfig, dataset: Dataset) -> None:
    """Refuse the checkpoint of another run.

    Raises:
        UsageError: naming the flags that differ, or the data.
    """
    if "config" not in facts:
        raise UsageError(f"checkpoint {path} is of a script, not of hpcasync train; load it with hpcasync.load_checkpoint")
    saved, mine = facts["config"], json.loads(json.dumps(config.keys()))
    free = {*FREE} - ({"epochs"} if config.schedule != "constant" else set())
    for key in dict.fromkeys(["mode", "rule", "base", *saved, *mine]):  # what others follow from comes first
        if key not in free and saved.get(key) != mine.get(key):
            raise UsageError(
                f"checkpoint {path} is of a run with {_flag(key, saved.get(key))}, now it is {_flag(key, mine.get(key))}; "
                "go on with the same, or start anew without --resume"
            )
    if facts["data"] != dataset.header.checksum:
        raise UsageError(
            f"checkpoint {path} is of a run on other data: its data set {saved['data']} had the checksum {facts['data']}, "
            f"{dataset.path} has {dataset.header.checksum}; go on with the same data"
        )
    if facts["position"]["epoch"] > config.epochs + 1:
        raise UsageError(
            f"checkpoint {path} is after {facts['position']['epoch'] - 1} epochs, but --epochs is {config.epochs}"
        )


def _flag(key: str, value: Any) -> str:
    name = f"--{key.replace('_', '-')}"
    return f"no {name}" if value is None else f"{name} {value}"
