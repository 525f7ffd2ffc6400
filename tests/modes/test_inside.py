"""What is measured inside a method: shares of the step, norms, quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.kernels import BASES
from hpcasync.modes import Async, KStep
from hpcasync.modes.inside import spread
from hpcasync.modes.local import RuleOptimizer
from hpcasync.rules.reference import base_step
from tests.modes.toys import mlp, train

ONE = World()


@pytest.mark.parametrize("variant", ["consistency", "opposed", "opposed-strength", "rate"])
@pytest.mark.parametrize("base", BASES)
def test_share_is_the_references(variant: str, base: str) -> None:
    rule = rules.TrendSmooth(base=base, variant=variant, lr=0.01, weight_decay=0.1).bind(1)
    group, rng = rule.group_options(), np.random.default_rng(3)
    names = ("w", *(v.name for v in rule.vectors))
    state = rng.normal(size=(len(names), 500)).astype(np.float32)
    state[1:] = abs(state[1:])
    state[1 + names[1:].index("trend")] *= np.where(rng.random(500) < 0.5, -0.01, 0.01)
    grad = rng.normal(size=500).astype(np.float32)
    before = state.copy()
    found = rule.shrink_share(state, grad, rule.hyper(group), 7, 2)
    by_name = {name: row.copy() for name, row in zip(names, state, strict=True)}
    step, _ = base_step(base, by_name, grad, group, 7)
    taken = rule.reference_modifier(by_name, step, group, 2)
    assert found == pytest.approx(1 - np.abs(taken).sum() / np.abs(step).sum(), abs=1e-5)
    assert 0 < found < 1
    np.testing.assert_array_equal(state, before)


@pytest.mark.parametrize("kind", [Async, RuleOptimizer])
def test_share_of_the_very_step(kind: type) -> None:
    """Plain SGD steps are -lr g, so that the share can be seen from outside."""
    model, rule = mlp(), rules.TrendSmooth(lr=0.1, base="sgd")
    opt = Async(model, rule, world=ONE) if kind is Async else RuleOptimizer(model, rule)
    train(opt, model, range(5))  # type: ignore[arg-type]
    assert not opt.shrink_shares  # nobody has asked
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.measure = True
    train(opt, model, range(5, 6))  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[name]).abs().sum() / (0.1 * p.grad.abs().sum())
        assert opt.shrink_shares[name] == pytest.approx(1 - float(moved), abs=1e-3)
    assert not opt.measure


def test_norms_of_the_block_momentum() -> None:
    """With mu = 0 the momentum is what a block has changed."""
    model = mlp()
    opt = KStep(torch.optim.SGD(model.parameters(), lr=0.1), every=3, block_lr=2.0, model=model, world=ONE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(opt, model, range(3))
    for name, p in model.named_parameters():
        assert opt.momentum_norms()[name] == pytest.approx(float((p.detach() - before[name]).norm()), rel=1e-4)


def test_spread_leaves_out_what_is_not_finite() -> None:
    assert spread([np.nan, 1.0, 3.0, 2.0, np.inf]) == {"lowest": 1, "25 %": 1.5, "median": 2, "75 %": 2.5, "highest": 3}
    assert spread([np.nan]) == {}
