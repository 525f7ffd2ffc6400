"""The block step: what K-step averaging does with the mean of several models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import block_update
from hpcasync.modes.interval import Pieces, interval_at, parse_every
from hpcasync.rules.base import between, whole

INNER_STATES = ("keep", "average", "reset")


@dataclass(frozen=True)
class BlockOptions:
    """When models are averaged and what becomes of the mean; see ``KStep`` for the options.

    Raises:
        UsageError: one of them is out of range.
    """

    every: int | str = 32
    block_momentum: float = 0.0
    nesterov: bool = False
    block_lr: float = 1.0
    warm_start: int = 0
    inner_state: str = "keep"

    def __post_init__(self) -> None:
        _ = self._pieces
        whole("warm_start", self.warm_start, 0)
        between("block_momentum", self.block_momentum, 0, 1, high_open=True)
        between("block_lr", self.block_lr, 0, math.inf, low_open=True)
        if self.inner_state not in INNER_STATES:
            raise unknown("inner_state", str(self.inner_state), INNER_STATES)

    @cached_property
    def _pieces(self) -> Pieces:
        return parse_every(self.every)

    def facts(self) -> dict[str, Any]:
        """The options by name, for ranks to agree on."""
        return asdict(self)

    @property
    def moving(self) -> bool:
        """Whether an average moves the model by a block momentum; otherwise the new model is the mean itself."""
        return self.block_momentum != 0 or self.block_lr != 1

    def warm(self, steps: int) -> bool:
        """Whether step number ``steps`` is one of the first that average without block momentum."""
        return steps <= self.warm_start

    def due(self, steps: int, since: int) -> bool:
        """Whether to average after step ``steps``, ``since`` steps after the last average."""
        return self.warm(steps) or since >= interval_at(self._pieces, steps - since)

    def least_every(self) -> int:
        """The smallest K of the schedule."""
        return min(k for k, _ in self._pieces)

    def apply(self, total: np.ndarray, anchor: np.ndarray, velocity: np.ndarray, count: int, *, plain: bool) -> None:
        """The step from the sum of ``count`` models, in place: ``total`` and ``anchor`` become the new model.

        Args:
            total: float32 or float64 (n,), the sum.
            anchor: (n,), the model after the last average.
            velocity: (n,), the block momentum.
            count: models in the sum.
            plain: without block momentum and block learning rate.
        """
        if plain or not self.moving:
            # The mean itself: anchor + (mean - anchor) would round.
            total /= count
            anchor[:] = total
        else:
            block_update(total, anchor, velocity, count, self.block_momentum, self.block_lr, self.nesterov)


BLOCK_KEYS = tuple(f.name for f in fields(BlockOptions))


def check_delay(delay: Any, options: BlockOptions) -> None:
    """Raise ``UsageError`` unless an average that takes ``delay`` more steps ends before the next begins."""
    whole("delay", delay, 0)
    least = options.least_every()
    if delay >= least:
        raise UsageError(
            f"delay={delay}: expected fewer steps than every ({least}), so that one average ends before the next"
        )
