"""What each method must do on paper: closed forms, and the settings that turn one rule into another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hpcasync.kernels import BASES
from hpcasync.kernels.fused import BLOCK
from hpcasync.rules import APAM, ASGD, DCASGD, EAMSGD, EASGD, GSGM, Hogwild, Rule, StalenessAware

SIZE = 2 * BLOCK + 7


def gradients(steps: int = 6, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((steps, size)) * 10.0 ** rng.integers(-8, 3, size)
    grads[rng.random((steps, size)) < 0.05] = 0
    return grads.astype(np.float32)


def run(rule: Rule, grads: np.ndarray, taus: Any = 0, delay: float = 0.0, arrivals: Any = 1) -> np.ndarray:
    """w after each step of the kernel, checked against the reference on the way, with all vectors.

    Args:
        delay: what the worker read differs from ``w`` by noise of this size.
    """
    rng = np.random.default_rng(1)
    size = grads.shape[1]
    group, hyper = rule.group_options(), rule.hyper(rule.group_options())
    state = np.zeros((1 + len(rule.vectors), size), np.float32)
    state[0] = rng.standard_normal(size)
    private = np.zeros((len(rule.private_vectors), size), np.float32)
    names = ["w", *(v.name for v in rule.vectors)]
    expected = {name: row.copy() for name, row in zip(names, state)}
    own = {"w": state[0].copy(), **{v.name: row.copy() for v, row in zip(rule.private_vectors, private)}}
    out = state[0].copy()
    seen = []
    for i, grad in enumerate(grads):
        if delay:
            out += (delay * rng.standard_normal(size)).astype(np.float32)
            own["w"] = out.copy()
        tau = int(np.broadcast_to(taus, len(grads))[i])
        arrival = int(np.broadcast_to(arrivals, len(grads))[i])
        rule.update(state, 0, grad, out, hyper, i + 1, tau, private=private, arrival=arrival)
        rule.reference(expected, grad, group, i + 1, tau, own=own, arrival=arrival)
        for name, row in zip(names, state):
            assert expected[name].dtype == np.float32
            np.testing.assert_array_equal(row.view(np.int32), expected[name].view(np.int32), name)
        np.testing.assert_array_equal(out.view(np.int32), own["w"].view(np.int32))
        for v, row in zip(rule.private_vectors, private):
            np.testing.assert_array_equal(row.view(np.int32), own[v.name].view(np.int32), v.name)
        seen.append(out.copy())
    return np.array(seen).view(np.int32)


OPTIONS = dict(lr=0.03, weight_decay=0.01)


@pytest.mark.parametrize("base", BASES)
def test_equals_the_reference_with_a_delay(base: str) -> None:
    grads = gradients()
    run(StalenessAware(base=base, **OPTIONS), grads, range(6), delay=0.1)
    run(DCASGD(base=base, compensation=0.3, **OPTIONS), grads, 2, delay=0.1)
    run(DCASGD(base=base, adaptive=True, **OPTIONS), grads, 2, delay=0.1)
    run(EASGD(base=base, **OPTIONS).bind(3), grads, 2, arrivals=[1, 0, 0, 1, 0, 0])
    run(GSGM(base=base, **OPTIONS).bind(3), grads, 2, delay=0.1, arrivals=[1, 2, 2, 3, 3, 3])
    run(GSGM(base=base, window=2, **OPTIONS).bind(3), grads, 2, delay=0.1)
    run(GSGM(base=base, average="round", **OPTIONS).bind(3), grads, 2, delay=0.1, arrivals=[1, 2, 3, 1, 2, 1])
    run(GSGM(base=base, average="groups", **OPTIONS).bind(3), grads, 2, delay=0.1, arrivals=[1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("step_size", ["constant", "sqrt"])
@pytest.mark.parametrize("style", ["code", "paper"])
@pytest.mark.parametrize("box", [{}, {"low": -0.5}, {"low": -0.5, "high": 0.25}])
def test_apam_equals_the_reference(style: str, step_size: str, box: dict[str, float]) -> None:
    seen = run(APAM(style=style, step_size=step_size, **OPTIONS, **box), gradients()).view(np.float32)
    assert np.isfinite(seen).all()
    if box:
        assert seen.min() == -0.5 and (len(box) == 1 or seen.max() == 0.25)


def test_apam_without_any_gradient_stays() -> None:
    """eps = 0 and no gradient yet: 0/0 is no step. Nor is there one where g^2 underflows."""
    grads = np.zeros((2, 4), np.float32)
    grads[:, 1] = 1e-30
    seen = run(APAM(style="paper", lr=0.5), grads).view(np.float32)
    assert np.isfinite(seen).all() and np.array_equal(seen[0], seen[1])
    one = run(APAM(style="paper", lr=0.5, betas=(0.0, 0.0)), np.array([[2, -3]], np.float32)).view(np.float32)
    start = np.random.default_rng(1).standard_normal(2).astype(np.float32)
    np.testing.assert_array_equal(one[0], start + np.float32([-0.5, 0.5]))  # m / sqrt(s_max) is the sign


SAME = [
    (DCASGD(compensation=0.0, **OPTIONS), ASGD(**OPTIONS)),
    (DCASGD(compensation=0.0, base="adam", **OPTIONS), ASGD(base="adam", **OPTIONS)),
    (DCASGD(compensation=0.0, adaptive=True, **OPTIONS), ASGD(**OPTIONS)),
    (APAM(**OPTIONS), ASGD(base="amsgrad", **OPTIONS)),
    (Hogwild(base="momentum", **OPTIONS), ASGD(base="momentum", **OPTIONS)),
    (GSGM(**OPTIONS), ASGD(base="ema", momentum=0.5, **OPTIONS)),  # P = 1, M = 1: momentum SGD with the factor 1 - mu
    (GSGM(base="momentum", momentum=0.9, **OPTIONS), ASGD(base="momentum", **OPTIONS)),
    (GSGM(base="momentum", average="round", **OPTIONS), ASGD(base="momentum", momentum=0.5, **OPTIONS)),
    (GSGM(window=1, **OPTIONS).bind(4), ASGD(base="ema", momentum=0.5, **OPTIONS)),
    (GSGM(window=1, average="groups", **OPTIONS).bind(4), ASGD(base="ema", momentum=0.5, **OPTIONS)),
]


@pytest.mark.parametrize("rule, other", SAME, ids=lambda r: r.name)
def test_settings_that_make_another_rule(rule: Rule, other: Rule) -> None:
    grads = gradients()
    np.testing.assert_array_equal(run(rule, grads, 3, delay=0.1), run(other, grads, 3, delay=0.1))


def test_ema_is_momentum_at_a_smaller_rate() -> None:
    """v = mu v + (1-mu) g is (1-mu) times the heavy ball's buffer: 1/2 here, so exact."""
    grads = gradients()
    ema, heavy = ASGD(base="ema", lr=0.5, momentum=0.5), ASGD(base="momentum", lr=0.25, momentum=0.5)
    np.testing.assert_allclose(run(ema, grads).view(np.float32), run(heavy, grads).view(np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [EASGD(period=1, **OPTIONS), EAMSGD(period=1, **OPTIONS)], ids=lambda r: r.name)
def test_easgd_without_exchange_is_the_base_on_the_copy(rule: Rule) -> None:
    grads = gradients()
    plain = run(ASGD(base=rule.base, **OPTIONS), grads)
    np.testing.assert_array_equal(run(rule.bind(2), grads, arrivals=0), plain)


def test_staleness_aware_by_hand() -> None:
    seen = run(StalenessAware(lr=1.0), np.ones((5, 1), np.float32), [0, 1, 2, 4, 8]).view(np.float32)[:, 0]
    np.testing.assert_allclose(np.diff(seen), [-1, -0.5, -0.25, -0.125], rtol=1e-6)


def test_dc_asgd_on_a_quadratic() -> None:
    """f = h w^2 / 2 with h = 2: two workers read w = 1 and push in turn; the second is compensated by its own read.

    All numbers are dyadic, so exact: lr 1/8, lambda 1/4, g = 2 at w = 1.
    """
    rule = DCASGD(lr=0.125, compensation=0.25)
    hyper = rule.hyper(rule.group_options())
    state = np.ones((1, 1), np.float32)
    read = [np.ones(1, np.float32), np.ones(1, np.float32)]

    def push(worker: int, tau: int) -> float:
        out = read[worker]
        rule.update(state, 0, 2 * out, out, hyper, 1, tau)
        return float(out[0])

    assert push(0, 0) == 1 - 0.125 * 2 == 0.75
    w = 0.75 - 0.125 * (2 + 0.25 * 4 * (0.75 - 1))  # worker 1 read 1
    assert push(1, 1) == w == 0.53125
    g = 2 * 0.75  # worker 0 read 0.75: its own last pull, not worker 1's
    w = w - 0.125 * (g + 0.25 * g * g * (w - 0.75))
    assert push(0, 1) == pytest.approx(w, abs=1e-7)


def test_dc_asgd_without_delay_survives_large_gradients() -> None:
    """g g overflows, times a difference of 0."""
    seen = run(DCASGD(lr=1e-20), np.full((2, 3), 1e25, np.float32)).view(np.float32)
    assert np.isfinite(seen).all()


def test_gsgm_window_is_the_mean_of_the_newest() -> None:
    """Three workers in turn, sum by private last gradients or ring of three: the mean of the last three."""
    rng = np.random.default_rng(0)
    grads = rng.integers(-8, 8, (9, 1)).astype(np.float32)
    results = []
    for rule in (GSGM(base="sgd", lr=1.0).bind(3), GSGM(base="sgd", lr=1.0, window=3).bind(3)):
        assert rule.stage == "sum"
        state, out = np.zeros((2, 1), np.float32), np.zeros(1, np.float32)
        privates = np.zeros((3, 1, 1), np.float32)
        notes = np.zeros(4, np.int64)
        w = []
        for i, g in enumerate(grads):
            arrival = rule.arrive(notes, i < 3, i // 3)
            rule.update(state, 0, g, out, rule.hyper(rule.group_options()), i + 1, 2, private=privates[i % 3], arrival=arrival)
            w.append(out[0])
        results.append(w)
    means = [np.float32(grads[max(0, i - 2) : i + 1].sum()) / np.float32(min(3, i + 1)) for i in range(9)]
    expected = np.cumsum(-np.array(means, np.float32), dtype=np.float32)
    for w in results:
        np.testing.assert_array_equal(np.array(w), expected)


def test_gsgm_groups_are_one_adam_step_per_group() -> None:
    """Three pushes per group: the steps, bias correction included, are those of Adam on the groups' means; exact in between."""
    grads = np.random.default_rng(0).integers(-8, 8, (7, 4)).astype(np.float32)
    rule = GSGM(base="adam", lr=0.5, average="groups", window=3).bind(3)
    state, out, notes = np.zeros((4, 4), np.float32), np.full(4, 9, np.float32), np.zeros(4, np.int64)
    seen = []
    for i, g in enumerate(grads):
        arrival = rule.arrive(notes, i < 3, i // 3)
        rule.update(state, 0, g, out, rule.hyper(rule.group_options()), i + 1, 2, arrival=arrival)
        np.testing.assert_array_equal(out, state[0])
        seen.append(out.copy())
    w = torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.5)
    expected = []
    for i in range(7):
        if i % 3 == 2:
            w.grad = torch.from_numpy(grads[i - 2 : i + 1].mean(0))
            adam.step()
        expected.append(w.detach().numpy().copy())
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)
    assert (seen[1] == 0).all() and (seen[2] != 0).all()
