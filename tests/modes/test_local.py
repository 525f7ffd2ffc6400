"""A rule as the optimizer of one process, and the torch optimizer that a plain rule maps to."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.kernels import BASES
from hpcasync.modes import Async, KStep, Sync
from hpcasync.modes.local import RuleOptimizer, torch_optimizer
from hpcasync.rules.base import OPTION_BASES
from tests.modes.toys import flat, mlp, train

ONE = World()
STEPS = range(6)


def trend(base: str = "adam") -> rules.Rule:
    return rules.TrendSmooth(base=base, lr=0.02, weight_decay=0.01)


@pytest.mark.parametrize("base", BASES)
def test_rule_optimizer_is_async_at_one_rank(base: str) -> None:
    a, b = mlp(), mlp()
    train(RuleOptimizer(a, trend(base)), a, STEPS)  # type: ignore[arg-type]
    train(Async(b, trend(base), world=ONE), b, STEPS)
    np.testing.assert_array_equal(flat(a), flat(b))


@pytest.mark.parametrize("wrap", ["sync", "kstep"])
def test_inside_the_synchronous_modes_at_one_rank(wrap: str) -> None:
    a, b = mlp(), mlp()
    inner = RuleOptimizer(a, trend())
    train(Sync(inner, world=ONE) if wrap == "sync" else KStep(inner, world=ONE, every=2), a, STEPS)
    train(RuleOptimizer(b, trend()), b, STEPS)  # type: ignore[arg-type]
    np.testing.assert_array_equal(flat(a), flat(b))


def test_saved_and_loaded() -> None:
    whole, half = mlp(), mlp()
    train(RuleOptimizer(whole, trend()), whole, range(8))  # type: ignore[arg-type]
    opt = RuleOptimizer(half, trend())
    train(opt, half, range(4))  # type: ignore[arg-type]
    weights, state = copy.deepcopy((half.state_dict(), opt.state_dict()))
    fresh = mlp(seed=4)
    opt = RuleOptimizer(fresh, trend())
    fresh.load_state_dict(weights)
    opt.load_state_dict(state)
    train(opt, fresh, range(4, 8))  # type: ignore[arg-type]
    np.testing.assert_array_equal(flat(fresh), flat(whole))


def test_the_model_may_change_between_steps() -> None:
    """w is the model's own, not a copy in the state."""
    model = torch.nn.Linear(2, 2)
    opt = RuleOptimizer(model, rules.ASGD(lr=1.0))
    for _ in range(2):
        with torch.no_grad():
            model.weight.fill_(5.0)
        model.weight.grad = torch.ones(2, 2)
        opt.step()
        assert (model.weight == 4).all()


@pytest.mark.parametrize("base", [b for b in BASES if b != "ema"])  # which torch does not have
def test_plain_rule_maps_to_the_torch_optimizer(base: str) -> None:
    given = {"momentum": 0.7, "alpha": 0.8, "betas": (0.7, 0.9), "eps": 1e-4}
    used = {k: v for k, v in given.items() if base in OPTION_BASES[k]}
    rule = rules.ASGD(base=base, lr=0.02, weight_decay=0.05, **used)
    a, b = mlp(), mlp()
    opt = torch_optimizer(rule, a)
    assert not isinstance(opt, RuleOptimizer)
    train(opt, a, STEPS)  # type: ignore[arg-type]
    train(RuleOptimizer(b, rule), b, STEPS)  # type: ignore[arg-type]
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


def test_torch_optimizer_of_other_rules_and_bad_ones() -> None:
    assert isinstance(torch_optimizer(trend(), mlp()), RuleOptimizer)
    with pytest.raises(UsageError, match="nesterov with momentum 0"):
        torch_optimizer(rules.ASGD(base="nesterov", momentum=0.0), mlp())
    assert isinstance(torch_optimizer(rules.ASGD(base="ema"), mlp()), RuleOptimizer)
    assert isinstance(torch_optimizer(rules.make_rule("plain", {"base": "momentum"}), mlp()), torch.optim.SGD)
    with pytest.raises(UsageError, match=r"'easgd' is about workers.*mode async"):
        torch_optimizer(rules.EASGD(), mlp())
    with pytest.raises(UsageError, match="float64"):
        RuleOptimizer(mlp().double(), trend())
    with pytest.raises(UsageError, match="lr=-1"):
        RuleOptimizer([{"params": mlp().parameters(), "lr": -1}], trend())
