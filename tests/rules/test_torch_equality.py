"""One worker without delay is the torch optimizer of the same name.

Tolerance: the formulas are the same, but torch fuses some products (addcmul, lerp, addcdiv) and the compiler
may contract them. Gradient with decay, base step and sum may each differ by 1 ulp of the largest |w| or |step|
so far, and w carries the error along: after step t the bound is 3 t ulp, per element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hpcasync.rules import ASGD, Rule, TrendSmooth

STEPS = 5
optim = torch.optim
Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

CASES: list[tuple[str, dict[str, Any], Maker]] = [
    ("sgd", dict(lr=0.1), lambda p: optim.SGD(p, 0.1)),
    ("sgd", dict(lr=0.1, weight_decay=0.02), lambda p: optim.SGD(p, 0.1, weight_decay=0.02)),
    ("momentum", dict(lr=0.1, momentum=0.8), lambda p: optim.SGD(p, 0.1, 0.8)),
    ("momentum", dict(lr=0.1, weight_decay=0.02), lambda p: optim.SGD(p, 0.1, 0.9, weight_decay=0.02)),
    ("nesterov", dict(lr=0.1, momentum=0.8), lambda p: optim.SGD(p, 0.1, 0.8, nesterov=True)),
    ("nesterov", dict(lr=0.1, weight_decay=0.02), lambda p: optim.SGD(p, 0.1, 0.9, 0, 0.02, nesterov=True)),
    ("rmsprop", dict(lr=0.01, alpha=0.9), lambda p: optim.RMSprop(p, 0.01, 0.9)),
    ("rmsprop", dict(lr=0.01, eps=1e-3, weight_decay=0.1),
     lambda p: optim.RMSprop(p, 0.01, eps=1e-3, weight_decay=0.1)),
    ("adagrad", dict(lr=0.1), lambda p: optim.Adagrad(p, 0.1, eps=1e-8)),
    ("adagrad", dict(lr=0.01, eps=1e-3, weight_decay=0.1),
     lambda p: optim.Adagrad(p, 0.01, eps=1e-3, weight_decay=0.1)),
    ("adam", dict(lr=0.01), lambda p: optim.Adam(p, 0.01)),
    ("adam", dict(lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
     lambda p: optim.Adam(p, 0.01, (0.8, 0.95), 1e-4, 0.1)),
    ("adamw", dict(lr=0.01, weight_decay=0.1), lambda p: optim.AdamW(p, 0.01, weight_decay=0.1)),
    ("adamw", dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.0),
     lambda p: optim.AdamW(p, 0.01, (0.8, 0.95), weight_decay=0)),
    ("amsgrad", dict(lr=0.01), lambda p: optim.Adam(p, 0.01, amsgrad=True)),
    ("amsgrad", dict(lr=0.01, weight_decay=0.1), lambda p: optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True)),
]  # fmt: skip


def run(rule: Rule, w: np.ndarray, grads: np.ndarray, tau: int = 0) -> np.ndarray:
    """The production kernel over several steps; returns w after each."""
    state = np.empty((1 + len(rule.vectors), w.size), np.float32)
    state[0] = w
    for row, vector in enumerate(rule.vectors, start=1):
        state[row] = vector.start
    seen = []
    for count, grad in enumerate(grads, start=1):
        out = np.empty_like(w)
        rule.update(state, 0, grad, out, rule.hyper(rule.group_options()), count, tau)
        seen.append(out)
    return np.array(seen)


def problem(seed: int = 0, size: int = 3000, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(size).astype(np.float32)
    return w, (rng.standard_normal((steps, size)) * 10.0 ** rng.integers(-3, 2, size)).astype(np.float32)


@pytest.mark.parametrize("base, options, maker", CASES)
def test_base_is_the_torch_optimizer(base: str, options: dict[str, Any], maker: Maker) -> None:
    w, grads = problem()
    ours = run(ASGD(base=base, **options), w, grads)
    p = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = maker([p])
    before, largest = w, np.abs(w)
    for step, grad in enumerate(grads):
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        theirs = p.detach().numpy().copy()
        largest = np.maximum(largest, np.maximum(np.abs(theirs), np.abs(theirs - before)))
        off = np.abs(ours[step] - theirs) / np.spacing(largest)
        assert off.max() <= 3 * (step + 1), (step, off.max())
        before = theirs
    assert np.abs(ours[-1] - w).max() > 1e-3  # it moved


NEUTRAL = [
    dict(variant="opposed", shrink=1.0),
    dict(variant="opposed-strength", floor=1.0),
    dict(variant="consistency", floor=1.0),
    dict(variant="rate", floor=1.0),
    dict(variant="rate", floor=0.0, down=1.0),
    dict(variant="opposed", shrink="staleness"),  # tau = 0: 1 / (1 + 0)
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
@pytest.mark.parametrize("base", ["sgd", "momentum", "nesterov", "rmsprop", "adagrad", "adam", "adamw", "amsgrad"])
def test_trend_smooth_without_shrinkage_is_asgd(base: str, options: dict[str, Any], masked: bool) -> None:
    w, grads = problem(1)
    plain = run(ASGD(base=base, lr=0.05, weight_decay=0.01), w, grads)
    ours = run(TrendSmooth(base=base, lr=0.05, weight_decay=0.01, masked=masked, **options), w, grads)
    np.testing.assert_array_equal(ours.view(np.int32), plain.view(np.int32))


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_shrink_by_staleness(tau: int) -> None:
    """lr 1, sgd: +1 then -1 against the trend: the second step is shrunk to 1 / (1 + tau)."""
    rule = TrendSmooth(lr=1.0, variant="opposed", shrink="staleness", beta=0.75)
    w = run(rule, np.zeros(1, np.float32), np.array([[-4], [1]], np.float32), tau)
    # d = 4, T = 1; then d = -1, T = 3/4 - 1/4 = 1/2: opposed
    assert w[0, 0] == 4
    assert w[1, 0] == np.float32(4) - np.float32(1 / (1 + tau))


def test_variants_by_hand() -> None:
    """d = 4, then d = -1, with beta = 3/4: T = 1, 1/2; A = 1, 1; r = 1, 1/2 (dyadic, exact)."""
    grads = np.array([[-4], [1]], np.float32)
    start = np.zeros(1, np.float32)

    def second_step(**options: Any) -> float:
        w = run(TrendSmooth(lr=1.0, beta=0.75, **options), start, grads)
        return float(w[1, 0] - w[0, 0])

    assert second_step(variant="opposed", shrink=0.25) == -0.25
    assert second_step(variant="opposed-strength", floor=0.5) == -0.75  # 1 - 1/2 * 1/2
    assert second_step(variant="consistency", floor=0.5) == -0.75  # 1/2 + 1/2 * 1/2
    assert second_step(variant="rate", floor=0.125, up=2.0, down=0.5) == -0.5
    assert second_step(variant="rate", floor=0.625, up=2.0, down=0.5) == -0.625


def test_agreeing_steps_are_not_shrunk() -> None:
    grads = -np.ones((10, 5), np.float32)
    for options in (dict(variant="opposed"), dict(variant="opposed-strength"), dict(variant="rate")):
        w = run(TrendSmooth(lr=0.5, **options), np.zeros(5, np.float32), grads)
        np.testing.assert_array_equal(w[-1], 5)


def test_adamw_decay_is_decoupled() -> None:
    """A zero gradient: Adam's moments stay 0, only the decay moves w."""
    w = run(
        ASGD(base="adamw", lr=0.5, weight_decay=0.5), np.ones(1, np.float32), np.zeros((2, 1), np.float32)
    )
    assert w[:, 0].tolist() == [0.75, 0.5625]
