"""The fused kernel equals the numpy reference of its rule, bit for bit, wherever a piece begins or ends."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hpcasync.kernels import BASES, VARIANTS
from hpcasync.kernels.fused import BLOCK, PLAIN_BLOCK
from hpcasync.rules import ASGD, Rule, TrendSmooth

RULES = [("none", False)] + [(v, m) for v in VARIANTS if v != "none" for m in (False, True)]
SIZES = (1, *(b + k for b in (BLOCK, PLAIN_BLOCK, 2048) for k in (-1, 0, 1)), 5000)


def make(base: str, variant: str, masked: bool, **options: object) -> Rule:
    if variant == "none":
        return ASGD(base=base, **options)
    return TrendSmooth(base=base, variant=variant, masked=masked, **options)


def fresh(rule: Rule, w: np.ndarray) -> np.ndarray:
    state = np.empty((1 + len(rule.vectors), w.size), np.float32)
    state[0] = w
    for row, vector in enumerate(rule.vectors, start=1):
        state[row] = vector.start
    return state


def as_dict(rule: Rule, state: np.ndarray) -> dict[str, np.ndarray]:
    return {n: row.copy() for n, row in zip(["w"] + [v.name for v in rule.vectors], state)}


def gradients(size: int, steps: int, seed: int = 0) -> np.ndarray:
    """Drift plus noise, over many magnitudes, with exact zeros: every branch of every variant is taken."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((steps, size)) + 0.5 * rng.standard_normal(size)
    grads *= 10.0 ** rng.integers(-12, 4, size)
    grads[rng.random((steps, size)) < 0.05] = 0
    return grads.astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.int32)


@pytest.mark.parametrize("variant, masked", RULES)
@pytest.mark.parametrize("base", BASES)
def test_equals_the_reference(base: str, variant: str, masked: bool) -> None:
    options = dict(lr=0.03, weight_decay=0.01)
    if variant != "none":
        options |= dict(beta=0.8, floor=0.1, shrink=0.3)
    rule = make(base, variant, masked, **options)
    group, hyper = rule.group_options(), rule.hyper(rule.group_options())
    for size in SIZES:
        rng = np.random.default_rng(size)
        w = rng.standard_normal(size).astype(np.float32)
        state, out = fresh(rule, w), np.full(size, np.nan, np.float32)
        expected = as_dict(rule, state)
        for count, grad in enumerate(gradients(size, 6), start=1):
            rule.update(state, 0, grad, out, hyper, count, tau=count)
            rule.reference(expected, grad, group, count, tau=count)
            for name, row in as_dict(rule, state).items():
                assert expected[name].dtype == np.float32
                np.testing.assert_array_equal(
                    bits(row), bits(expected[name]), f"{name}, size {size}, step {count}"
                )
            np.testing.assert_array_equal(bits(out), bits(state[0]))


def test_gradients_take_both_branches() -> None:
    """Guards the test above: the variants differ from plain ASGD and from each other on these gradients."""
    seen = []
    for variant, masked in RULES:
        rule = make("sgd", variant, masked, lr=0.03)
        state = fresh(rule, np.zeros(5000, np.float32))
        for count, grad in enumerate(gradients(5000, 6), start=1):
            rule.update(
                state, 0, grad, np.empty(5000, np.float32), rule.hyper(rule.group_options()), count, 0
            )
        seen.append(state[0].copy())
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a != b).mean() > 0.2


@pytest.mark.parametrize("count", [1, 2, 3, 10, 37, 100, 999, 5000, 12345, 10**6])
@pytest.mark.parametrize("base", ["adam", "adamw", "amsgrad"])
def test_bias_correction_at_large_counts(base: str, count: int) -> None:
    rule = ASGD(base=base, lr=1e-3, betas=(0.9, 0.999))
    group = rule.group_options()
    state = fresh(rule, np.ones(100, np.float32))
    state[1:] = np.random.default_rng(1).random((len(rule.vectors), 100))
    expected = as_dict(rule, state)
    grad = gradients(100, 1)[0]
    rule.update(state, 0, grad, np.empty(100, np.float32), rule.hyper(group), count, 0)
    rule.reference(expected, grad, group, count, 0)
    np.testing.assert_array_equal(bits(state[0]), bits(expected["w"]))


@pytest.mark.parametrize("variant, masked", RULES)
@pytest.mark.parametrize("base", BASES)
def test_any_cut_gives_the_same_bits(base: str, variant: str, masked: bool) -> None:
    """Pieces of odd sizes at odd offsets, inside a larger state whose other elements stay as they are."""
    rule = make(base, variant, masked, lr=0.03, weight_decay=0.01)
    hyper = rule.hyper(rule.group_options())
    size, before, after = 5000, 13, 7
    w = np.random.default_rng(5).standard_normal(before + size + after).astype(np.float32)
    whole, cut = fresh(rule, w), fresh(rule, w)
    out_whole, out_cut = np.zeros(size, np.float32), np.zeros(size, np.float32)
    cuts = sorted(sorted([0, 1, 4, 1000, BLOCK, BLOCK + 1, PLAIN_BLOCK + 3, 2 * PLAIN_BLOCK, size]))
    for count, grad in enumerate(gradients(size, 3), start=1):
        rule.update(whole, before, grad, out_whole, hyper, count, 2)
        for lo, hi in pairwise(cuts):
            rule.update(cut, before + lo, grad[lo:hi], out_cut[lo:hi], hyper, count, 2)
    np.testing.assert_array_equal(bits(whole), bits(cut))
    np.testing.assert_array_equal(bits(out_whole), bits(out_cut))
    np.testing.assert_array_equal(bits(out_whole), bits(whole[0, before : before + size]))
    start = fresh(rule, w)
    for part in (slice(0, before), slice(before + size, None)):
        np.testing.assert_array_equal(whole[:, part], start[:, part])


@pytest.mark.parametrize("base", BASES)
def test_out_may_be_the_state_itself(base: str) -> None:
    rule = make(base, "consistency", False, weight_decay=0.01)
    hyper = rule.hyper(rule.group_options())
    w = np.random.default_rng(6).standard_normal(3000).astype(np.float32)
    apart, aliased, out = fresh(rule, w), fresh(rule, w), np.empty(3000, np.float32)
    for count, grad in enumerate(gradients(3000, 3), start=1):
        rule.update(apart, 0, grad, out, hyper, count, 0)
        rule.update(aliased, 0, grad, aliased[0], hyper, count, 0)
    np.testing.assert_array_equal(bits(apart), bits(aliased))


def test_gradient_is_not_written() -> None:
    rule = make("adam", "consistency", False, weight_decay=0.1)
    grad = gradients(3000, 1)[0]
    kept = grad.copy()
    rule.update(
        fresh(rule, np.ones(3000, np.float32)),
        0,
        grad,
        np.empty(3000, np.float32),
        rule.hyper(rule.group_options()),
        1,
        0,
    )
    np.testing.assert_array_equal(bits(grad), bits(kept))
