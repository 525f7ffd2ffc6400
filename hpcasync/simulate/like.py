"""What a recorded live run tells about its machine: step times of every rank, messages, meetings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcasync.errors import UsageError
from hpcasync.train.step_log import BLOCK

_STREAM = 13  # of the random numbers, beside the seed


@dataclass(frozen=True)
class Recording:
    """Single steps of a live run.

    Attributes:
        steps: per rank float (steps, 3): seconds of compute, communicate and wait of each.
        exchange: mean seconds that a step communicated, of those that did: an average of the synchronous modes.
        meeting: mean seconds that an epoch lasts longer than the steps of its slowest rank.
    """

    steps: tuple[np.ndarray, ...]
    exchange: float
    meeting: float

    def draw(self, worker: int, seed: int, turn: int) -> np.ndarray:
        """All steps of the worker's rank once, in blocks of consecutive steps, newly shuffled each ``turn``.

        All workers take the same blocks at the same time: what slowed the machine down slowed all ranks, and ranks that
        share a core took from each other. A worker beyond the ranks is like one of them.
        """
        own = self.steps[worker % len(self.steps)]
        blocks = -(-max(map(len, self.steps)) // BLOCK)
        order = np.random.default_rng([seed, _STREAM, turn]).permutation(blocks)
        return np.concatenate([own[b * BLOCK : (b + 1) * BLOCK] for b in order])


@dataclass(frozen=True)
class Like:
    """Measured per rank: mean seconds per step.

    Attributes:
        compute: of a gradient, the loader included.
        communicate: of push and pull together.
        recording: the single steps; None for a run file that has only sums.
    """

    compute: tuple[float, ...]
    communicate: tuple[float, ...]
    recording: Recording | None


def read_like(folder: Path) -> Like:
    """What a finished live run measured.

    Raises:
        UsageError: no finished run there, or one without steps.
    """
    from hpcasync.train.records import read_ranks
    from hpcasync.train.step_log import read_steps, unfinished

    ranks = read_ranks(folder)
    with unfinished(folder / "run.h5"):
        count = np.array([int(r["updates"]) + int(r["skipped"]) for r in ranks], float)
        if not count.all():
            raise UsageError(f"{folder}: a rank made no step; expected a run with steps on every rank")
        compute, communicate = (
            tuple(float(r[name]) / n for r, n in zip(ranks, count, strict=True)) for name in ("compute", "communicate")
        )
        found = read_steps(folder)
        return Like(compute, communicate, None if found is None else _recording(*found))


def _recording(steps: np.ndarray, meetings: np.ndarray) -> Recording | None:
    own = tuple(rank[~np.isnan(rank[:, 0])].astype(float) for rank in steps)
    if not all(map(len, own)):
        return None
    messages = np.concatenate(own)[:, 1]
    sent = messages[messages > 0]
    whole = meetings[:, ~np.isnan(meetings).any((0, 2))].astype(float)
    # What the slowest rank's steps do not explain: barriers, reads, ranks that begin late.
    meeting = (whole.sum((1, 2)).max() - whole[..., -1].max(0).sum()) / whole.shape[1] if whole.size else 0.0
    return Recording(own, float(sent.mean()) if sent.size else 0.0, max(0.0, float(meeting)))
