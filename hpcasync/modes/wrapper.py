"""A torch optimizer around a torch optimizer: shares its groups and state, so that schedulers and users see one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpcasync.comm import Collectives, World, agree, check_backend, make_collectives
from hpcasync.errors import UsageError
from hpcasync.modes.base import Closure, Mode, OnNonfinite
from hpcasync.modes.flat import check_dtypes, groups_of


class _Skip(Exception):
    """Leaves an inner optimizer's step before it has changed anything."""

    def __init__(self, ranks: str, loss: Any) -> None:
        super().__init__(ranks)
        self.ranks = ranks
        self.loss = loss


class Wrapper(Mode):
    """Base of the synchronous modes.

    Args:
        optimizer: the torch optimizer that makes the local step.
        world: from ``hpcasync.init()``.
        model: whose buffers to keep equal; optional.
        on_nonfinite: what to do with a NaN or infinite gradient.
        collectives: what sums over the ranks: a backend's name, or an object that the caller keeps and closes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        world: World | None,
        model: torch.nn.Module | None,
        on_nonfinite: OnNonfinite,
        collectives: str | Collectives,
        facts: dict[str, Any],
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, Mode):
            raise UsageError(
                f"mode {self.mode} wraps a torch optimizer, such as torch.optim.SGD(...); found {type(optimizer).__name__}"
            )
        if isinstance(collectives, str):
            check_backend(collectives)
        self.inner = optimizer
        self._closed = False
        _, self.names, _ = groups_of(optimizer.param_groups, model)
        super().__init__(
            optimizer.param_groups, optimizer.defaults, world=world, model=model, on_nonfinite=on_nonfinite
        )
        check_dtypes(self.params, self.names, [torch.float32, torch.float64], self.mode)
        self._share_inner()
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        agree(
            self.world,
            {
                "the model's parameter shapes": [(tuple(p.shape), str(p.dtype)) for p in self.params],
                "the optimizer": type(optimizer).__name__,
                "the parameter groups' options": repr(options),
                "on_nonfinite": on_nonfinite,
                "collectives": collectives if isinstance(collectives, str) else type(collectives).__name__,
                **facts,
            },
        )
        self.collectives = make_collectives(collectives, self.world) if isinstance(collectives, str) else collectives
        self._opened = isinstance(collectives, str)
        self._broadcast_parameters()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with this mode's own state under ``"hpcasync"``."""
        return {**self.inner.state_dict(), "hpcasync": self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            UsageError: the state of another mode.
        """
        own = state_dict.get("hpcasync", {})
        if own.get("mode") != self.mode:
            raise UsageError(f"the state is of mode {own.get('mode')!r}, expected {self.mode!r}")
        self.inner.load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self._share_inner()
        self._load_own_state(own)

    def _step_with(self, closure: Closure, bad: Callable[[], str]) -> Any:
        """The inner optimizer's step with a closure; skipped if its first evaluation gives a non-finite gradient.

        A later evaluation (LBFGS) has moved the parameters already: the optimizer must go on from there.

        Args:
            closure: re-evaluates the model and returns the loss.
            bad: names the ranks with a non-finite gradient after an evaluation, empty if there are none.
        """
        first = True

        def checked() -> Any:
            nonlocal first
            with torch.enable_grad():
                loss = closure()
            ranks = bad() if first else ""
            first = False
            if ranks:
                raise _Skip(ranks, loss)
            return loss

        try:
            loss = self.inner.step(checked)
        except _Skip as skip:
            self._nonfinite(skip.ranks)
            return skip.loss
        self.updates += 1
        return loss

    def _own_state(self) -> dict[str, Any]:
        return {"mode": self.mode, "steps": self.steps, "updates": self.updates, "skipped": self.skipped}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self.steps, self.updates, self.skipped = own["steps"], own["updates"], own["skipped"]

    def _share_inner(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @torch.no_grad()
    def _broadcast_parameters(self) -> None:
        """Give every rank the parameters of rank 0."""
        if self.world.size == 1:
            return
        for p in self.params:
            host = p.detach().to("cpu", copy=True).contiguous().view(-1)
            self.world.collectives.broadcast(host.numpy())
            p.copy_(host.view(p.shape))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.synchronize()
            if self._opened:
                self.collectives.close()
                self.collectives = self.world.collectives
