"""The checkpoints in a run's folder: their names, the newest good one, how many are kept."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from hpcasync.errors import UsageError
from hpcasync.train.checkpoint_file import DamagedError
from hpcasync.train.checkpoint_ranks import facts_of

_NAME = re.compile(r"checkpoint-(\d{6,})\.h5")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first: their numbers count the checkpoints written."""
    with contextlib.suppress(OSError):
        numbers = {int(m[1]): p for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))}
        return [numbers[n] for n in sorted(numbers)]
    return []


def next_checkpoint(folder: Path) -> Path:
    """The path of the next one to be written."""
    old = checkpoints(folder)
    return folder / f"checkpoint-{1 + (_number(old[-1]) if old else 0):06d}.h5"


def newest_good(folder: Path) -> tuple[Path | None, str]:
    """The newest checkpoint that is whole, None where there is none at all, and what to say about damaged newer ones.

    Raises:
        UsageError: all are damaged, or the newest whole one is of a newer format.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            facts_of(path)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        return path, f"{'; '.join(damaged)}. Going on from {path} instead" if damaged else ""
    if damaged:
        raise UsageError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Remove them to start anew, or give another --output"
        )
    return None, ""


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep``."""
    for path in checkpoints(folder)[:-keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove what killed or failed writers left behind; only for who holds the folder's lock, and writes nothing just now."""
    for path in folder.glob(".checkpoint-*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
