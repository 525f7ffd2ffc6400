"""What all three modes have in common: the world, the accounting, the treatment of non-finite gradients, closing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from hpcasync.comm import World, init
from hpcasync.errors import UsageError, unknown
from hpcasync.modes.buffers import average_buffers, broadcast_buffers
from hpcasync.stats import Staleness, TimeShare

# torch keeps these two from being compiled, and imports its compiler for that: a second at the start of every rank.
_ZERO_GRAD = inspect.unwrap(torch.optim.Optimizer.zero_grad)
_ADD_PARAM_GROUP = inspect.unwrap(torch.optim.Optimizer.add_param_group)
OnNonfinite = Literal["skip", "abort"]
Closure = Callable[[], Any]


class Mode(torch.optim.Optimizer):
    """A torch optimizer that trains together with the other ranks.

    Feed schedulers that look at a loss (ReduceLROnPlateau) the same loss on every rank, or their learning rates part.

    Attributes:
        world: the ranks.
        everyone: the same but in mode hierarchical, whose ``world`` is this rank's group: all ranks.
        share: where this rank's time went.
        staleness: histogram of this rank's pushes (empty in synchronous modes).
        updates: steps of this rank that changed the model.
        skipped: steps that were skipped for a NaN or infinite gradient.
        steps: calls of ``step()``.
    """

    mode = ""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        world: World | None,
        model: nn.Module | None,
        on_nonfinite: OnNonfinite,
    ) -> None:
        if on_nonfinite not in ("skip", "abort"):
            raise unknown("on_nonfinite", str(on_nonfinite), ("skip", "abort"))
        self._fixed = False
        super().__init__(groups, defaults)
        self._fixed = True
        self.world = init() if world is None else world
        self.everyone: World = getattr(self, "everyone", self.world)
        self.share = TimeShare()
        self.staleness = Staleness()
        self.updates = 0
        self.skipped = 0
        self.steps = 0
        self._model = model
        self._on_nonfinite = on_nonfinite
        if model is not None:
            broadcast_buffers(model, self.world)

    @property
    def params(self) -> list[torch.Tensor]:
        """All parameters, group by group."""
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.share.start()
        _ZERO_GRAD(self, set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._fixed:
            raise UsageError(
                "add_param_group after the optimizer is made: the ranks' buffers are laid out already. "
                "Give all groups at the start; frozen parameters may be unfrozen later."
            )
        _ADD_PARAM_GROUP(self, param_group)

    def _nonfinite(self, ranks: str) -> None:
        """Count a skipped step, warn once, or abort."""
        self.skipped += 1
        message = f"{ranks}, step {self.steps}: NaN or infinity in the gradient"
        if self._on_nonfinite == "abort":
            raise FloatingPointError(f"{message} (on_nonfinite='abort')")
        if self.skipped == 1:
            warnings.warn(
                f"{message}; the step is skipped. Further ones are counted without a word.", RuntimeWarning, stacklevel=4
            )

    def synchronize(self) -> None:
        """Give every rank the same model, for evaluation or saving: parameters and averaged buffers. Collective."""
        raise NotImplementedError

    def _synchronize_buffers(self) -> None:
        if self._model is not None:
            average_buffers(self._model, self.world)

    def close(self) -> None:
        """Leave the others: the model stays usable, the optimizer is done. Collective and idempotent."""

    def __enter__(self) -> Mode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # after an error the others may never come; the job is about to end
            self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Mode:
        raise TypeError(f"{type(self).__name__} holds the ranks' shared buffers and can't be copied; copy the model")
