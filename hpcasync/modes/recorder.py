"""What a mode tells a recorder: every meeting of a rank with the store, so that the run can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np


class Event(IntEnum):
    """What a rank did, beside computing gradients. The values stand in record files: never change one."""

    PUSH = 1
    """A gradient was applied and the new parameters read."""
    SKIP = 2
    """A gradient with NaN or infinity was dropped; the newest parameters were read."""
    DISCARD = 3
    """A gradient that came out of turn was dropped; the newest parameters were read."""
    GATE = 4
    """The bound on staleness: waited, or read again."""
    TURN = 5
    """Waited for the rank's turn."""
    SYNC = 6
    """``synchronize()``: all ranks met, read the same parameters, and averaged the buffers."""
    MEET = 7
    """Waited for the others at the end of an epoch, or to decide on a checkpoint."""
    CHECKPOINT = 8
    EVALUATE = 9
    RESUME = 10
    """The run went on from a checkpoint; the newest parameters were read."""


class Recorder(Protocol):
    """Told of a rank's events; all times are of ``time.perf_counter``."""

    def pushing(self, grads: Sequence[np.ndarray | None], hypers: Sequence[np.ndarray], clock: int) -> None:
        """A push is about to be made: which parameters have a gradient, their hyper-parameters, the worker's clock."""

    def event(self, kind: Event, began: float, waited: float) -> None:
        """Something is over that began at ``began`` and waited for others for ``waited`` seconds."""
