"""The kernels on torch's threads: the same bits as on one, and the same verdict."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.kernels import BASES, GRADIENTS, HYPER, PLAN, VARIANTS, fused_update, team
from hpcasync.rules.base import BASE_VECTORS

SIZE = 3 * team.CHUNK + 7
OPTIONS = {
    "lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "alpha": 0.99, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
    "trend_beta": 0.9, "shrink": 0.5, "floor": 0.02, "up": 1.02, "down": 0.9,
    "compensation": 0.5, "square_decay": 0.9, "square_eps": 1e-7, "low": -1.0, "high": 1.5, "moving_rate": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("variant, gradient", [(v, "own") for v in VARIANTS] + [("none", g) for g in GRADIENTS])
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("own_copy", [False, True])
def test_same_bits_as_one_thread(base: str, variant: str, gradient: str, own_copy: bool) -> None:
    rng = np.random.default_rng(0)
    hyper = np.zeros(len(HYPER))
    for name, value in OPTIONS.items():
        hyper[HYPER[name]] = value
    vectors = len(BASE_VECTORS[base])
    plan = np.zeros(len(PLAN), np.int64)
    settings = {"base": BASES[base], "variant": VARIANTS[variant], "gradient": GRADIENTS[gradient]}
    for name, value in (settings | {"vectors": vectors, "window": 2, "boxed": 1, "own_copy": int(own_copy)}).items():
        plan[PLAN[name]] = value
    one = np.abs(rng.standard_normal((3 + vectors, SIZE + 32), np.float32))
    private_one = np.abs(rng.standard_normal((3, SIZE + 32), np.float32))
    two, private_two = one.copy(), private_one.copy()
    grad = rng.standard_normal(SIZE, np.float32)
    out_one = rng.standard_normal(SIZE, np.float32)
    out_two = out_one.copy()
    fused_update(one, 16, grad, out_one, private_one, plan, hyper, 3, 2, 1)
    team.update(2, two, 16, grad, out_two, private_two, plan, hyper, 3, 2, 1)
    np.testing.assert_array_equal(one.view(np.int32), two.view(np.int32))
    np.testing.assert_array_equal(private_one.view(np.int32), private_two.view(np.int32))
    np.testing.assert_array_equal(out_one.view(np.int32), out_two.view(np.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("at", [0, team.CHUNK, SIZE - 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite(threads: int, at: int, bad: float) -> None:
    values = np.ones(SIZE, np.float32)
    assert team.finite(threads, values)
    values[at] = bad
    assert not team.finite(threads, values)


def test_without_openmp_one_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_runner", lambda: None)
    assert team.finite(2, np.ones(SIZE, np.float32))


def test_torch_offers_its_threads() -> None:
    """Not a must on every platform, but on Linux its absence would only show as lost speed."""
    assert team._runner() is not None
