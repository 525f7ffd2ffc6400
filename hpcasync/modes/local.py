"""A rule as an ordinary torch optimizer of one process: the sequential baseline, and the inner optimizer of other modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcasync.errors import UsageError
from hpcasync.modes.flat import Source, check_dtypes, flat_grad, groups_of
from hpcasync.rules import ASGD, Plain, Rule, TrendSmooth


class RuleOptimizer(torch.optim.Optimizer):
    """Applies a rule to this process's parameters only, with its vectors in ``state`` as any torch optimizer.

    Args:
        params: a module, parameters, or parameter groups, float32.
        rule: what a gradient does; it is bound to one worker.

    Attributes:
        measure, shrink_shares: as of ``Async``.

    Raises:
        UsageError: a rule with copies per worker, no trainable parameter, options out of range.
    """

    def __init__(self, params: Source, rule: Rule) -> None:
        rule = bind_alone(rule)
        groups, names, _ = groups_of(params)
        for group in groups:
            rule.check_options(rule.group_options() | group)
        super().__init__(groups, rule.group_options())
        self.rule = rule
        self.measure, self.shrink_shares = False, dict[str, float]()
        self._names = {p: name for p, name in zip((p for g in groups for p in g["params"]), names, strict=True)}
        flat = [p for group in self.param_groups for p in group["params"]]
        check_dtypes(flat, names, [torch.float32], "of a rule")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients as they are; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        measure, self.measure = self.measure, False
        for group in self.param_groups:
            hyper = self.rule.hyper(group)
            for p in group["params"]:
                grad = flat_grad(p, "a parameter")
                if grad is not None:
                    self._update(p, grad, hyper, measure)
        return loss

    def _update(self, p: torch.Tensor, grad: np.ndarray, hyper: np.ndarray, measure: bool) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["rows"] = torch.zeros(1 + len(self.rule.vectors), p.numel())
            for row, vector in enumerate(self.rule.vectors, start=1):
                state["rows"][row] = vector.start
        state["step"] += 1
        rows = state["rows"].numpy()
        rows[0] = p.detach().reshape(-1).cpu().numpy()
        if measure and isinstance(self.rule, TrendSmooth) and grad.size:
            self.shrink_shares[self._names[p]] = self.rule.shrink_share(rows, grad, hyper, state["step"], 0)
        self.rule.update(rows, 0, grad, rows[0], hyper, state["step"], 0)
        p.copy_(state["rows"][0].view(p.shape))


def bind_alone(rule: Rule) -> Rule:
    """The rule for one worker that shares nothing.

    Raises:
        UsageError: a rule that makes no sense then.
    """
    if rule.own_copy:
        raise UsageError(f"rule {rule.name!r} is about workers and a centre that they share: it needs mode async")
    return rule.bind(1)


def torch_optimizer(rule: Rule, params: Source) -> torch.optim.Optimizer:
    """The optimizer of one process that does what ``rule`` does: torch's own for a plain base step.

    Args:
        rule: a rule; plain (`ASGD`) rules map to the torch optimizer of their base.
        params: a module, parameters, or parameter groups.

    Raises:
        UsageError: no trainable parameter.
    """
    if type(rule) not in (ASGD, Plain) or rule.base == "ema":
        return RuleOptimizer(params, rule)
    groups, _, _ = groups_of(params)
    common: dict[str, Any] = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    adam = {**common, "betas": rule.betas, "eps": rule.eps}
    momentum = {**common, "momentum": rule.momentum}
    optim = torch.optim
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: optim.SGD(groups, **common),
        "momentum": lambda: optim.SGD(groups, **momentum),
        "nesterov": lambda: optim.SGD(groups, nesterov=True, **momentum),
        "rmsprop": lambda: optim.RMSprop(groups, alpha=rule.alpha, eps=rule.eps, **common),
        "adagrad": lambda: optim.Adagrad(groups, eps=rule.eps, **common),
        "adam": lambda: optim.Adam(groups, **adam),
        "adamw": lambda: optim.AdamW(groups, **adam),
        "amsgrad": lambda: optim.Adam(groups, amsgrad=True, **adam),
    }
    if rule.base == "nesterov" and rule.momentum == 0:
        raise UsageError("base nesterov with momentum 0: expected momentum > 0, or base sgd")
    return makers[rule.base]()
