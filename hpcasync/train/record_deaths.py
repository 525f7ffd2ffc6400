"""What the record of a run that outlives ranks keeps of deaths, beside the push that a rank was in: on rank 0, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcasync.store import Torn

if TYPE_CHECKING:
    from hpcasync.train.run import Run


class MeetingsAtDeaths:
    """Keeps the averaged buffers of the meetings that a death may have cut short, and of the one before.

    Such a meeting is begun again, perhaps after some buffers had been averaged with the dead rank's; or a rank dies after
    its buffers have been averaged, and before it can record that it was there. All ranks have the same buffers then.

    Args:
        run: with `Survival`, on rank 0.

    Attributes:
        number: of the next meeting, from 0.
    """

    def __init__(self, run: Run) -> None:
        self.number = 0
        self._run, self._deaths = run, 0
        self._last: list[np.ndarray] = []
        self._kept: dict[int, list[np.ndarray]] = {}

    def over(self) -> None:
        """A ``synchronize()`` is over."""
        now = [buffer.detach().cpu().numpy().copy() for buffer in self._run.model.buffers()]
        if self._somebody_died():
            self._kept |= {self.number - 1: self._last, self.number: now}
        self._last = now
        self.number += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept, by its place in the file."""
        if self._somebody_died():
            self._kept[self.number - 1] = self._last
        return {f"deaths/meeting-{n}-{i}": b for n, buffers in self._kept.items() for i, b in enumerate(buffers)}

    def _somebody_died(self) -> bool:
        survival = self._run.survival
        before, self._deaths = self._deaths, 0 if survival is None else len(survival.deaths)
        return self._deaths != before


def torn_arrays(torn: Sequence[Torn]) -> dict[str, np.ndarray]:
    """Shards that dead ranks held, by their places in the file: by shard and version ``state`` and ``notes``."""
    found: dict[str, np.ndarray] = {}
    for of in torn:
        found |= {f"deaths/{what}-{of.shard}-{of.version}": getattr(of, what) for what in ("state", "notes")}
    return found


def torn_of(arrays: Mapping[str, np.ndarray]) -> list[Torn]:
    """What ``torn_arrays`` gave, in the order of the versions."""
    found = []
    for name, state in arrays.items():
        what, *numbers = name.split("-")
        if what == "state":
            shard, version = map(int, numbers)
            found.append(Torn(shard, version, state, arrays[f"notes-{shard}-{version}"]))
    return sorted(found, key=lambda of: of.version)


def meetings_of(arrays: Mapping[str, np.ndarray]) -> dict[int, list[np.ndarray]]:
    """The buffers that `MeetingsAtDeaths` kept, by the meeting's number."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for name, values in arrays.items():
        what, *numbers = name.split("-")
        if what == "meeting":
            found.setdefault(int(numbers[0]), {})[int(numbers[1])] = values
    return {number: [buffers[i] for i in range(len(buffers))] for number, buffers in found.items()}
