"""One virtual worker: its copy, its place in the data, where its virtual time goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from hpcasync.data import Loader
from hpcasync.simulate.cluster import StepTimes
from hpcasync.store import Worker


class Phase(Enum):
    """What a worker is doing."""

    ABSENT = auto()
    BUSY = auto()
    """Computing, or its push is on its way."""
    HELD = auto()
    """Its push has arrived; the rule admits it in a later round."""
    GATED = auto()
    """Too far ahead of the slowest."""
    BLOCK = auto()
    """Waiting for the average at the end of a block."""
    SUM = auto()
    """Waiting for the sum of an average that goes on while the others compute."""
    DONE = auto()
    """Waiting for the others at the end of the epoch."""


@dataclass
class Virtual:
    """A worker of the simulation.

    Attributes:
        index: among all workers.
        group: of the store that it pushes to.
        view: its view of that store.
        out: its copy of the parameters.
        loader: its data.
        times: its step times.
        batches: samples of each step of the epoch.
        step: the next of them.
        replays: batches that guided SGD has it replay before that.
        life: counts failures; an event of an earlier life is void.
    """

    index: int
    group: int
    view: Worker
    out: np.ndarray
    loader: Loader
    times: StepTimes
    batches: list[np.ndarray] = field(default_factory=list)
    replays: list[np.ndarray] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    steps: int = 0
    since: int = 0
    life: int = 0
    phase: Phase = Phase.ABSENT
    present_from: float = 0.0
    present: float = 0.0
    compute: float = 0.0
    communicate: float = 0.0
    computing: float = 0.0
    """Compute seconds of the gradient under way: counted when it arrives."""
    sending: float = 0.0
    """Seconds that its push will travel."""
    refused: float | None = None
    """When its held gradient came."""
    called: bool = False
    """Its turn has come, and it is about to see that."""
    gated: float = 0.0
    """Since when it has waited for slower workers."""
    samples: int = 0
    updates: int = 0
    skipped: int = 0
    discarded: int = 0

    @property
    def at_end(self) -> bool:
        """Whether it has done its share of the epoch."""
        return self.step == len(self.batches) and not self.replays

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """Take this epoch's batches, the same as the live loader's."""
        self.loader.set_epoch(epoch)
        self.batches = self.loader.indices()
        self.epoch, self.step = epoch, step

    def record(self, end: float) -> dict[str, object]:
        """Where its time went, as a live rank records it."""
        total = self.present + (end - self.present_from if self.phase is not Phase.ABSENT else 0.0)
        wait = max(0.0, total - self.compute - self.communicate)
        parts = {"compute": self.compute, "communicate": self.communicate, "wait": wait}
        return {
            "seconds": end,
            **parts,
            "share": {k: v / total if total else 0.0 for k, v in parts.items()},
            "samples": self.samples,
            "updates": self.updates,
            "skipped": self.skipped,
            "discarded": self.discarded,
            "staleness": self.view.staleness.counts,
        }
