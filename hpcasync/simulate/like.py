"""What a recorded live run tells about its machine: workers, compute time and communication time per step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcasync.errors import UsageError


@dataclass(frozen=True)
class Like:
    """Measured per rank: mean seconds per step.

    Attributes:
        compute: of a gradient, the loader included.
        communicate: of push and pull together.
    """

    compute: tuple[float, ...]
    communicate: tuple[float, ...]


def read_like(folder: Path) -> Like:
    """The means of a finished live run. The run file has sums, so how step times vary is not in it.

    Raises:
        UsageError: no finished run there, or one without steps.
    """
    from hpcasync.train.records import read_ranks

    ranks = read_ranks(folder)
    steps = np.array([int(r["updates"]) + int(r["skipped"]) for r in ranks], float)
    if not steps.all():
        raise UsageError(f"{folder}: a rank made no step; expected a run with steps on every rank")
    compute, communicate = (
        tuple(float(r[name]) / n for r, n in zip(ranks, steps, strict=True)) for name in ("compute", "communicate")
    )
    return Like(compute, communicate)
