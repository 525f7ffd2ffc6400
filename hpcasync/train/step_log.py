"""How long each step of a rank took: a bounded sample for the run file, from which the simulator draws."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcasync.errors import damaged
from hpcasync.stats import TimeShare

if TYPE_CHECKING:
    import h5py

BLOCK = 64
"""Consecutive steps that are kept or dropped together: machines are slow for a while, not for a step."""
BLOCKS = 64
"""Blocks kept at most; then every second one goes, and from there on only every second one is kept."""
COLUMNS = ("compute", "communicate", "wait")
"""Waiting for copies between a GPU and the host counts as communication here."""
MEETING = (*COLUMNS, "steps")
"""Of the meeting at the end of an epoch; ``steps``: seconds of all steps before it."""


class StepLog:
    """Measures steps by the differences of a rank's `TimeShare`; costs about a microsecond per step.

    Args:
        share: of the rank's mode.
    """

    def __init__(self, share: TimeShare) -> None:
        self._share = share
        self._last = self._read()
        self._kept = np.empty((BLOCKS, BLOCK, 3), np.float32)
        self._count = 0  # steps measured
        self._stride = 1  # of the blocks that are kept
        self._began = sum(self._last)
        self._meetings: list[tuple[float, ...]] = []

    def begin(self) -> None:
        """An epoch's first step begins now: what lies before it, an evaluation and the like, is no step's."""
        self._last = self._read()
        self._began = sum(self._last)

    def step(self) -> None:
        """A step is over."""
        compute, communicate, wait = now = self._read()
        last = self._last
        self._last = now
        block, place = divmod(self._count, BLOCK)
        self._count += 1
        if block % self._stride:
            return
        if block == BLOCKS * self._stride:
            self._kept[: BLOCKS // 2] = self._kept[::2]
            self._stride *= 2
        self._kept[block // self._stride, place] = compute - last[0], communicate - last[1], wait - last[2]

    def meeting(self) -> None:
        """All ranks have met at the end of an epoch; the time since the last step is the meeting's."""
        last = self._last
        spent = [now - then for now, then in zip(self._read(), last, strict=True)]
        self._meetings.append((*spent, sum(last) - self._began))

    def record(self) -> dict[str, Any]:
        """``steps`` float32 (steps kept, 3), seconds by ``COLUMNS``; ``meetings`` float32 (epochs, 4) by ``MEETING``."""
        block, place = divmod(self._count, BLOCK)
        whole = -(-block // self._stride)  # blocks kept and full
        size = whole * BLOCK + (place if block % self._stride == 0 else 0)
        steps = self._kept.reshape(-1, 3)[:size].copy()
        return {"steps": steps, "meetings": np.array(self._meetings, np.float32).reshape(-1, 4), "every": self._stride}

    def _read(self) -> tuple[float, float, float]:
        share = self._share
        return share.compute, share.communicate + share.copy, share.wait


def write_steps(file: h5py.File, ranks: list[dict[str, Any]]) -> None:
    """Write ``steps/`` and ``meetings/`` of a run file, (ranks, entries) each; a rank with fewer is filled up with NaN."""
    for group, columns in (("steps", COLUMNS), ("meetings", MEETING)):
        widest = max(len(rank[group]) for rank in ranks)
        table = np.full((len(ranks), widest, len(columns)), np.nan, np.float32)
        for row, rank in zip(table, ranks, strict=True):
            row[: len(rank[group])] = rank[group]
        for column, name in enumerate(columns):
            file[f"{group}/{name}"] = table[:, :, column]
    file["steps"].attrs.update({"block": BLOCK, "every": ranks[0]["every"]})


def read_steps(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What ``write_steps`` wrote: steps (ranks, steps, 3) and meetings (ranks, epochs, 4), seconds; None where there is none.

    Raises:
        UsageError: no finished run there.
    """
    import h5py

    path = folder / "run.h5"
    with unfinished(path), h5py.File(path, "r") as file:
        if "steps" not in file:
            return None
        steps = np.stack([file[f"steps/{name}"][:] for name in COLUMNS], axis=-1)
        return steps, np.stack([file[f"meetings/{name}"][:] for name in MEETING], axis=-1)


def unfinished(path: Path) -> AbstractContextManager[None]:
    """Around what reads ``run.h5``: whatever fails there is told as one `UsageError`."""
    return damaged(f"{path}: not a finished run of hpcasync", "give the folder of a run that came to its end")
