"""What happened inside the method since the last evaluation, beside its curves: for the rows of a run."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from hpcasync.comm import World
from hpcasync.modes import Async, Guided, Hierarchical, KStep, Mode
from hpcasync.modes.inside import spread
from hpcasync.rules import TrendSmooth

INSIDE = {
    "shrink_share": "per parameter, the part of the base's step (L1) that trend-smooth took from the last gradient of rank 0",
    "out_of_turn": "per rank, gradients that were held until its turn (gsgm), or discarded",
    "scores": "quantiles over all ranks of the final scores psi of guided SGD's remembered batches",
    "block_momentum": "per parameter, Euclidean norm of the block momentum after the last average",
}
"""What a row may have under ``inside``: by these names, each a number by a column's name."""
MOST_SCORES = 4096
"""Scores of a rank that are kept between two evaluations; the newest."""

Numbers = dict[str, dict[str, float]]


class Inside:
    """Measures a live run; costs nothing at a step that `last_step` is not told of.

    Args:
        mode: of this rank.
        guided: around it, if any.
        world: all ranks.
    """

    def __init__(self, mode: Mode, guided: Guided | None, world: World) -> None:
        self._mode, self._world = mode, world
        self._out_of_turn = 0
        self._scores: deque[float] = deque(maxlen=MOST_SCORES)
        if guided is not None:
            guided.scored = self._scores.extend
        self._guided = guided is not None
        optimizer: Any = getattr(mode, "inner", mode)
        self._shrinks = optimizer if isinstance(getattr(optimizer, "rule", None), TrendSmooth) else None

    def last_step(self) -> None:
        """The step that is about to be made is the last one before an evaluation."""
        # Not in mode async across nodes: reading the whole state there while others push is long, and may begin again and again.
        if self._shrinks is not None and self._world.rank == 0 and self._mode.world.nodes == 1:
            self._shrinks.measure = True

    def state_dict(self) -> dict[str, Any]:
        """What has come up since the last evaluation, on this rank."""
        return {"scores": np.array(self._scores), "out_of_turn": self._count() - self._out_of_turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._scores.clear()
        self._scores.extend(state["scores"].tolist())
        self._out_of_turn = self._count() - state["out_of_turn"]

    def _count(self) -> int:
        return self._mode.out_of_turn if isinstance(self._mode, Async) else 0

    def row(self) -> Numbers:
        """What is known by the names of ``INSIDE``. Collective; the answer is rank 0's."""
        mode, gather, found = self._mode, self._world.gather, Numbers()
        if self._shrinks is not None:
            found["shrink_share"] = dict(self._shrinks.shrink_shares)
        if isinstance(mode, Async) and mode.rule.in_turn:
            now = self._count()
            told = gather((mode._worker.index, now - self._out_of_turn))
            found["out_of_turn"] = {f"rank {i}": float(n) for i, n in told}
            self._out_of_turn = now
        if self._guided:
            found["scores"] = spread(score for own in gather(list(self._scores)) for score in own)
            self._scores.clear()
        if isinstance(mode, (KStep, Hierarchical)) and mode.options.moving:
            found["block_momentum"] = mode.momentum_norms()
        return {name: numbers for name, numbers in found.items() if numbers}
