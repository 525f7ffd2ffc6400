"""All ranks' state of a mode inside a Lightning checkpoint: a checkpoint of ours, its bytes as one tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcasync.errors import UsageError
from hpcasync.modes import Mode
from hpcasync.train.checkpoint import load_checkpoint, save_checkpoint

KEY = "hpcasync"


def embed(checkpoint: MutableMapping[str, Any], mode: Mode) -> None:
    """Put the state of ``mode``, of all ranks, under ``KEY`` into rank 0's ``checkpoint``. Collective.

    A tensor of bytes, so that ``torch.load(weights_only=True)`` takes it and other strategies pass over it.
    """
    with tempfile.TemporaryDirectory(prefix="hpcasync-") as folder:
        path = Path(folder) / "state.h5"
        save_checkpoint(path, mode)
        if mode.everyone.rank == 0:
            checkpoint[KEY] = torch.from_numpy(np.fromfile(path, np.uint8))


def extract(checkpoint: Mapping[str, Any], mode: Mode) -> tuple[str, ...]:
    """Bring back what ``embed`` put in. Collective.

    Returns:
        What was reset, since the number of ranks is another.

    Raises:
        UsageError: the same on every rank: not there, damaged, or of another mode, rule or model.
    """
    found = mode.everyone.gather(KEY in checkpoint)
    if not all(found):
        raise UsageError(
            "the checkpoint holds no state of hpcasync: another strategy wrote it. This optimizer can take its weights only: "
            "Module.load_from_checkpoint(path), then fit without ckpt_path"
        )
    with tempfile.TemporaryDirectory(prefix="hpcasync-") as folder:
        path = Path(folder) / "state.h5"
        if mode.everyone.rank == 0:
            checkpoint[KEY].numpy().tofile(path)
        reset: tuple[str, ...] = load_checkpoint(path, mode).reset
    return reset
