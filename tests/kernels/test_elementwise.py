"""The small kernels: finite check, scaling, and the block-momentum step against hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.kernels import all_finite, block_update, scale


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 64, 67])
def test_all_finite_sees_every_position(bad: float, size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert all_finite(values)
    for i in range(size):
        values_i = values.copy()
        values_i[i] = bad
        assert not all_finite(values_i), i


def test_all_finite_takes_extremes_and_nothing() -> None:
    info = np.finfo(np.float32)
    assert all_finite(
        np.array([info.max, info.min, info.tiny, info.smallest_subnormal, -0.0, 0.0], np.float32)
    )
    assert all_finite(np.empty(0, np.float32))
    signalling = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert not all_finite(signalling[:1]) and not all_finite(signalling[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale(dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal(1001).astype(dtype)
    expected = values * dtype(1 / 3)
    scale(values, 1 / 3)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_blocks_by_hand(dtype: type) -> None:
    """Two ranks, mu = 1/2, lr = 1: dyadic numbers, so every step is exact.

    Block 1: models 2 and 4 from w = 1: mean 3, d = 2, v = 2, w = 3 (first step: v is d, with d's sign).
    Block 2: models 2 and 1 from w = 3: mean 3/2, d = -3/2, v = 1/2 * 2 - 3/2 = -1/2, w = 5/2.
    """
    total, anchor, velocity = np.array([6.0], dtype), np.array([1.0], dtype), np.zeros(1, dtype)
    block_update(total, anchor, velocity, 2, 0.5, 1.0, False)
    assert (total[0], anchor[0], velocity[0]) == (3, 3, 2)
    total[0] = 3
    block_update(total, anchor, velocity, 2, 0.5, 1.0, False)
    assert (total[0], anchor[0], velocity[0]) == (2.5, 2.5, -0.5)
    assert total.dtype == velocity.dtype == dtype


def test_two_blocks_with_nesterov_and_block_rate_by_hand() -> None:
    """mu = 1/2, lr = 2, Nesterov: w = anchor + lr d + mu v with the new v.

    Block 1: mean 3 from w = 1: lr d = 4, v = 4, w = 1 + 4 + 2 = 7.
    Block 2: mean 6 from w = 7: lr d = -2, v = 2 - 2 = 0, w = 7 - 2 + 0 = 5.
    """
    total, anchor, velocity = (
        np.array([6.0], np.float32),
        np.array([1.0], np.float32),
        np.zeros(1, np.float32),
    )
    block_update(total, anchor, velocity, 2, 0.5, 2.0, True)
    assert (total[0], anchor[0], velocity[0]) == (7, 7, 4)
    total[0] = 12
    block_update(total, anchor, velocity, 2, 0.5, 2.0, True)
    assert (total[0], anchor[0], velocity[0]) == (5, 5, 0)


def test_block_update_without_momentum_is_the_mean() -> None:
    rng = np.random.default_rng(3)
    models = rng.integers(-64, 64, (4, 500)).astype(np.float32)
    anchor = rng.integers(-64, 64, 500).astype(np.float32)
    total, velocity = models.sum(0), np.zeros(500, np.float32)
    block_update(total, anchor, velocity, 4, 0.0, 1.0, False)
    np.testing.assert_array_equal(total, models.mean(0))


def test_block_update_follows_torch_sgd_as_outer_optimizer() -> None:
    """The outer step is SGD with momentum on the gradient ``anchor - mean``: sign and exponent."""
    import torch

    for nesterov in (False, True):
        rng = np.random.default_rng(4)
        p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(50)))
        outer = torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=nesterov)
        anchor, velocity = p.detach().numpy().copy(), np.zeros(50)
        for _ in range(5):
            total = 3 * (anchor + rng.standard_normal(50))
            p.grad = torch.from_numpy(anchor - total / 3)
            outer.step()
            block_update(total, anchor, velocity, 3, 0.9, 0.7, nesterov)
            np.testing.assert_allclose(anchor, p.detach().numpy(), rtol=1e-12, atol=1e-12)
            np.testing.assert_array_equal(total, anchor)
