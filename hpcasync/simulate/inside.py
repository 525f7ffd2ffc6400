"""What happened inside the method since the last evaluation, as a live run records it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcasync.modes.inside import layer_norms, shrink_shares, spread
from hpcasync.rules import Rule, TrendSmooth
from hpcasync.simulate.worker import Virtual
from hpcasync.store import Layout, Store
from hpcasync.train.inside import Numbers


class Inside:
    """Measures a simulation; its numbers are those of `hpcasync.train.inside.INSIDE`.

    Args:
        rule: of the run.
        layers: where each parameter lies.
        names: of the parameters.

    Attributes:
        scores: final scores of guided SGD since the last row.
        velocity: the block momentum, flat; None where there is none.
    """

    def __init__(self, rule: Rule, layers: Layout, names: Sequence[str]) -> None:
        self._rule, self._layers, self._names = rule, layers, names
        self._shares: dict[str, float] = {}
        self._out_of_turn: list[int] = []
        self.scores: list[float] = []
        self.velocity: np.ndarray | None = None

    def last_push(
        self, store: Store, worker: Virtual, parts: Sequence[np.ndarray | None], hypers: Sequence[np.ndarray]
    ) -> None:
        """The worker is about to push ``parts``, for the last time before an evaluation."""
        if isinstance(self._rule, TrendSmooth):
            self._shares = shrink_shares(store, worker.view, parts, hypers, self._layers, self._names)

    def row(self, workers: Sequence[Virtual]) -> Numbers:
        """What is known, by the names of ``INSIDE``."""
        found: Numbers = {"shrink_share": self._shares, "scores": spread(self.scores)}
        self._shares = {}
        self.scores.clear()
        if self.velocity is not None:
            found["block_momentum"] = layer_norms(self.velocity, self._layers, self._names)
        if self._rule.in_turn:
            before, now = self._out_of_turn or [0] * len(workers), [w.view.held + w.discarded for w in workers]
            self._out_of_turn = now
            found["out_of_turn"] = {f"rank {i}": float(b - a) for i, (a, b) in enumerate(zip(before, now, strict=True))}
        return {name: numbers for name, numbers in found.items() if numbers}
