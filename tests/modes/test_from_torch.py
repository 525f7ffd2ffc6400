"""Rules whose base step is that of a torch optimizer, and modes around one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.modes.from_torch import make_mode, rule_of
from hpcasync.modes.local import RuleOptimizer

Make = Callable[[Any], optim.Optimizer]


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (lambda p: optim.SGD(p, lr=0.1, weight_decay=0.01), "sgd"),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.8), "momentum"),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True), "nesterov"),
        (lambda p: optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-6), "rmsprop"),
        (lambda p: optim.Adagrad(p, lr=0.1), "adagrad"),
        (lambda p: optim.Adam(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), "adam"),
        (lambda p: optim.Adam(p, lr=0.01, amsgrad=True), "amsgrad"),
        (lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1), "adamw"),
    ],
)
def test_async_with_one_rank_is_the_optimizer(make: Make, base: str) -> None:
    """Five steps with a schedule, two groups of different learning rates."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(8, 6)
    optimizers: list[optim.Optimizer] = []
    for net in nets:
        groups: Any = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.003}]
        optimizers.append(make(groups))
    schedules = [optim.lr_scheduler.StepLR(o, 2, 0.5) for o in optimizers]
    steppers: list[Any] = [optimizers[0], make_mode("async", optimizers[1], world=World(), model=nets[1])]
    assert steppers[1].rule.base == base
    assert list(steppers[1]._flat.names) == [n for n, _ in nets[1].named_parameters()]
    for _ in range(5):
        for net, stepper, schedule in zip(nets, steppers, schedules, strict=True):
            stepper.zero_grad()
            net(x).square().mean().backward()
            stepper.step()
            schedule.step()
    assert steppers[1].param_groups[1]["lr"] == pytest.approx(0.003 / 4)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    steppers[1].close()


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3))]


def test_rule_by_name_by_object_and_of_the_optimizer() -> None:
    sgd = optim.SGD(params(), lr=0.1, momentum=0.8)
    named = rule_of(sgd, "trend-smooth", {"floor": 0.3})
    assert isinstance(named, rules.TrendSmooth) and (named.floor, named.lr, named.momentum) == (0.3, 0.1, 0.8)
    given = rules.GSGM(base="momentum", lr=0.1, momentum=0.8)
    assert rule_of(sgd, given) is given
    own = RuleOptimizer(params(), rules.TrendSmooth(base="adam", lr=0.01))
    assert rule_of(own).base == "adam"
    assert make_mode("sync", own, world=World()).inner is own  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "rule", "options", "says"),
    [
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), None, {}, "SGD with dampening=0.1: no base step has it"),
        (lambda p: optim.SGD(p, lr=0.1, maximize=True), None, {}, "maximize=True"),
        (lambda p: optim.SGD([{"params": p, "maximize": True}], lr=0.1), None, {}, "maximize=True"),
        (lambda p: optim.RMSprop(p, momentum=0.5), None, {}, "RMSprop with momentum=0.5"),
        (lambda p: optim.Adam(p, lr=torch.tensor(0.1)), None, {}, "a tensor as lr"),
        (lambda p: optim.AdamW(p, amsgrad=True), None, {}, "amsgrad=True and decoupled weight decay"),
        (lambda p: optim.Rprop(p), None, {}, "no rule has the step of Rprop; known are SGD, RMSprop, Adagrad, Adam, AdamW"),
        (lambda p: optim.SGD(p, lr=0.1), rules.ASGD(lr=0.2), {}, "ASGD has lr=0.2, the optimizer SGD lr=0.1"),
        (lambda p: optim.SGD(p, lr=0.1), rules.ASGD(lr=0.1, base="adam"), {}, "base='adam', the optimizer SGD base='sgd'"),
        (lambda p: optim.SGD(p, lr=0.1), rules.ASGD(lr=0.1), {"floor": 1}, "rule_options beside a rule"),
        (lambda p: optim.SGD(p, lr=0.1), "asgd", {"base": "adam"}, "rule_options has base, which the optimizer says"),
        (lambda p: optim.SGD(p, lr=0.1), None, {"floor": 0.1}, "rule 'asgd' has no option 'floor'"),
        (lambda p: RuleOptimizer(p, rules.ASGD()), "gsgm", {}, "has rule 'asgd' already"),
    ],
)  # fmt: skip
def test_refused(make: Make, rule: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        rule_of(make(params()), rule, options)


def test_a_mode_is_not_wrapped_again() -> None:
    mode = make_mode("sync", optim.SGD(params(), lr=0.1), world=World())
    with pytest.raises(UsageError, match=r"starts from a torch optimizer.*found Sync"):
        make_mode("async", mode, world=World())
