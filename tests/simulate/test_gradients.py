"""The lanes that gradients go by: all alike up to rounding, and the right one for each model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from hpcasync.data import Dataset
from hpcasync.simulate.gradients import Gradient, Gradients
from hpcasync.simulate.perceptron import Perceptron
from hpcasync.store import make_layout
from tests.simulate.toys import CLASSES, FEATURES, bits, mlp, run

WORKERS = 5


def per_parameter(side: Gradients, gradient: Gradient) -> list[np.ndarray | None]:
    """The parts of a gradient by parameter."""
    if len(gradient.parts) == len(side.layout.sizes):
        return gradient.parts
    (flat,) = gradient.parts
    assert flat is not None
    return [flat[start : start + size] for start, size in zip(side.layout.starts, side.layout.sizes, strict=True)]


MODELS = {
    "mlp": (mlp, "compiled"),
    "sigmoid": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 5), nn.Sigmoid(), nn.Linear(5, CLASSES)), "compiled"),
    "no bias": (lambda: nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.ReLU(), nn.Linear(8, CLASSES)), "compiled"),
    "logistic": (lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES)), "compiled"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)), "threads"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)), "threads"),
    "frozen": (lambda: frozen(), "threads"),
    "dropout": (lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)), "naive"),
}


def frozen() -> nn.Module:
    model = mlp()
    next(model.parameters()).requires_grad_(False)
    return model


def gradients(model: nn.Module, data: Dataset, batched: bool, threads: int = 2) -> Gradients:
    layout = make_layout([p.numel() for p in model.parameters()])
    copies = np.random.default_rng(0).standard_normal((WORKERS, layout.total)).astype(np.float32) / 2
    return Gradients(model, layout, copies, data.as_torch(), batched=batched, threads=threads)


@pytest.mark.parametrize("name", MODELS)
def test_lanes_agree(data: Dataset, name: str) -> None:
    make, lane = MODELS[name]
    torch.manual_seed(0)
    model = make()
    both = [gradients(model, data, True), gradients(make(), data, False)]
    assert both[0].lane == lane and both[1].lane == "naive"
    assert bool(both[0].note) == (lane == "naive")
    batches = [np.arange(7 * i, 7 * i + 4 + i % 3) for i in range(WORKERS)]  # of different sizes
    for side in both:
        for worker in range(WORKERS):
            side.request(worker, batches[worker])
    for worker in (3, 0, 4, 2, 1):
        torch.manual_seed(worker)
        a = both[0].take(worker)
        torch.manual_seed(worker)
        b = both[1].take(worker)
        assert a.samples == b.samples == len(batches[worker])
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        for x, y in zip(per_parameter(both[0], a), b.parts, strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        both[0].release(a)
    for x, y in zip(both[0].buffers, both[1].buffers, strict=True):
        for u, v in zip(x, y, strict=True):
            torch.testing.assert_close(u, v)
    both[0].close()


@pytest.mark.parametrize("name", ["mlp", "sigmoid", "layer norm", "batch norm"])
def test_the_bits_do_not_depend_on_the_threads(data: Dataset, name: str) -> None:
    make, _ = MODELS[name]
    found = []
    for threads in (2, 3, 5):
        torch.manual_seed(0)
        side = gradients(make(), data, True, threads)
        for worker in range(WORKERS):
            side.request(worker, np.arange(worker, worker + 7), when=-worker)
        parts = [p for w in range(WORKERS) for p in side.take(w).parts if p is not None]
        found.append(bits(np.concatenate(parts)))
        side.close()
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_batch_of_every_size_and_a_canceled_worker(data: Dataset) -> None:
    side, naive = gradients(mlp(), data, True), gradients(mlp(), data, False)
    for size in (1, 2, 15, 16, 17, 33, 96):
        for one in (side, naive):
            one.request(3, np.arange(size))
        a, b = side.take(3), naive.take(3)
        for x, y in zip(per_parameter(side, a), b.parts, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        side.release(a)
    side.request(1, np.arange(4))
    side.cancel(1)
    with pytest.raises(KeyError):
        side.take(1)
    side.close()


def test_nan_is_not_lost_in_an_activation(data: Dataset) -> None:
    side = gradients(mlp(), data, True)
    side.copies[0, 0] = np.nan
    side.request(0, np.arange(4))
    found = side.take(0)
    assert not found.finite and np.isnan(found.loss)
    side.close()


def test_what_fits_the_matrix_products() -> None:
    shared = nn.Linear(4, 4)
    for model in (
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        nn.Sequential(shared, nn.ReLU(), shared),
        nn.Sequential(nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Flatten(2), nn.Linear(4, 2)),
        nn.Linear(4, 2),
    ):
        assert not Perceptron.fits(model)
    hooked = mlp()
    hooked[0].register_forward_hook(lambda *args: None)
    assert not Perceptron.fits(hooked)
    assert Perceptron.fits(mlp())


def test_batch_statistics_are_averaged_and_repeat(data: Dataset) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    first, second = (run(data, model(), workers=3, compute="exponential:1.0") for _ in range(2))
    assert first.curve == second.curve
    naive = run(data, model(), workers=3, compute="exponential:1.0", naive=True)
    np.testing.assert_allclose(first.parameters, naive.parameters, rtol=1e-3, atol=1e-4)


def test_dropout_repeats_and_says_that_it_is_slow(data: Dataset) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    with pytest.warns(RuntimeWarning, match="one by one"):
        first = run(data, model(), workers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = run(data, model(), workers=3)
    np.testing.assert_array_equal(bits(first.parameters), bits(second.parameters))


def test_a_nonfinite_gradient_is_skipped_or_ends_the_run(data: Dataset) -> None:
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        found = run(data, workers=3, lr=1e30)
    assert found.result["skipped"] > 0
    with pytest.raises(FloatingPointError, match="worker"):
        run(data, workers=3, lr=1e30, on_nonfinite="abort")
