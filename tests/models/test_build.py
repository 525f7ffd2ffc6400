"""The five models, the user's own, and what is refused."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from hpcasync.errors import UsageError
from hpcasync.models import build, known


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("logistic", (1, 28, 28), 7_850),
        ("mlp", (1, 28, 28), 109_386),
        ("lenet5", (1, 28, 28), 61_706),
        ("lenet5", (1, 32, 32), 61_706),
        ("allcnn", (3, 32, 32), 1_369_738),
        ("resnet20", (3, 32, 32), 269_722),
    ],
)
def test_sizes_are_those_of_the_papers(name, shape, parameters):
    assert sum(p.numel() for p in build(name, shape, 10).parameters()) == parameters


@pytest.mark.parametrize("name", known())
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (4, 40, 33), (2, 5, 1)])
def test_every_model_takes_images_and_learns(name, shape):
    torch.manual_seed(0)
    model = build(name, shape, 7)
    assert model.training
    out = model(torch.randn(3, *shape))
    assert out.shape == (3, 7)
    torch.nn.functional.cross_entropy(out, torch.tensor([0, 3, 6])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_flat_features():
    assert build("mlp", (13,), 3)(torch.zeros(2, 13)).shape == (2, 3)
    assert build("logistic", (13,), 3)(torch.zeros(2, 13)).shape == (2, 3)
    for name in ("lenet5", "allcnn", "resnet20"):
        with pytest.raises(UsageError, match=rf"{name}.* takes images \(C, H, W\), .* \(13,\)"):
            build(name, (13,), 3)


def test_aliases_and_unknown_names():
    assert repr(build("LeNet", (1, 28, 28), 10)) == repr(build("lenet-5", (1, 28, 28), 10))
    with pytest.raises(UsageError, match="unknown model 'lenett'; did you mean 'lenet'"):
        build("lenett", (1, 28, 28), 10)


def test_the_check_leaves_no_trace():
    """The zero sample must not reach the statistics of batch normalisation."""
    model = build("resnet20", (3, 32, 32), 10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 19
    assert all(int(m.num_batches_tracked) == 0 and m.training for m in norms)


@pytest.mark.parametrize(("shape", "classes"), [((), 2), ((0, 8, 8), 2), ((1, 8, 8), 0)])
def test_impossible_shapes(shape, classes):
    with pytest.raises(UsageError, match="expected"):
        build("mlp", shape, classes)


OWN = """
    import torch
    from torch import nn

    constant = 3

    def both(shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

    def keywords(**given):
        return both(**given)

    def only_classes(classes, hidden=5):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Linear(hidden, classes))

    def nothing():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def frozen():
        return nothing().requires_grad_(False)

    def bare():
        return nn.Flatten()

    def convolution():
        return nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())

    def needs_more(shape, classes, depth):
        return nothing()

    def fails():
        raise RuntimeError("no luck")

    def number():
        return 3

    class Pair(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)

        def forward(self, x):
            return x, x

    class Part(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 10))
            self[1].eval()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder, which is not on the path."""
    (tmp_path / "own_models.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize("function", ["both", "keywords", "only_classes", "nothing", "Part"])
def test_a_model_of_the_users(own, function):
    before = list(sys.path)
    model = build(f"own_models:{function}", (1, 8, 8), 10)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sys.path == before


def test_the_mode_of_each_part_is_kept(own):
    model = build("own_models:Part", (1, 8, 8), 10)
    assert model.training and not model[1].training


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", "cannot import 'nowhere'"),
        (":f", "cannot import ''"),
        ("own_models:noting", "unknown function in own_models 'noting'; did you mean 'nothing'"),
        ("own_models:constant", "unknown function in own_models 'constant'"),
        ("own_models:frozen", "no trainable parameter"),
        ("own_models:bare", "no trainable parameter"),
        ("own_models:needs_more", "failed with TypeError.*depth"),
        ("own_models:fails", "failed with RuntimeError: no luck"),
        ("own_models:number", "returned a int"),
        ("own_models:Pair", "returns tuple for one sample"),
        ("own_models:convolution", r"does not take samples of shape \(1, 8, 8\).*expects \(3, H, W\)"),
    ],
)
def test_models_that_are_refused(own, name, words):
    with pytest.raises(UsageError, match=words):
        build(name, (1, 8, 8), 10)


def test_the_output_must_be_as_wide_as_there_are_classes(own):
    with pytest.raises(UsageError, match=r"returns \(1, 10\) .* \(1, 8, 8\), expected \(1, 4\)"):
        build("own_models:nothing", (1, 8, 8), 4)
    with pytest.raises(UsageError, match=r"shape \(1, 9, 9\): .*expects 64 features"):
        build("own_models:nothing", (1, 9, 9), 10)
