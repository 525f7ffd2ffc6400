"""Flat views: whatever un-shares a parameter, its values survive and it becomes a view again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcasync.errors import UsageError
from hpcasync.modes.flat import FlatParameters, flat_grad
from hpcasync.store import make_layout

shapes = st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=6)


def make(sizes: list[tuple[int, ...]]) -> tuple[list[torch.nn.Parameter], FlatParameters]:
    """Parameters with distinct values, and their flat views."""
    params = [torch.nn.Parameter(torch.rand(shape) + i) for i, shape in enumerate(sizes)]
    layout = make_layout([p.numel() for p in params], 32)
    return params, FlatParameters(params, [f"p{i}" for i in range(len(params))], layout, torch.zeros(layout.total))


@given(shapes)
def test_values_shapes_and_storage(sizes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    expected = [torch.rand(shape) + i for i, shape in enumerate(sizes)]
    torch.manual_seed(0)
    params, flat = make(sizes)
    for p, value, start in zip(params, expected, flat.layout.starts, strict=True):
        assert p.shape == value.shape and torch.equal(p, value)
        assert p.data_ptr() == flat.buffer.data_ptr() + 4 * start
    flat.buffer.add_(1)
    for p, value in zip(params, expected, strict=True):
        assert torch.equal(p, value + 1)
    assert not flat.attach()


@given(shapes, st.data())
def test_attach_takes_over_new_values(sizes: list[tuple[int, ...]], data: st.DataObject) -> None:
    params, flat = make(sizes)
    changed = data.draw(st.sets(st.integers(0, len(params) - 1)))
    expected = [p.detach().clone() for p in params]
    for i in changed:
        expected[i] = torch.rand(params[i].shape)
        params[i].data = expected[i].clone()
    assert flat.attach() == bool(changed)
    for p, value, start in zip(params, expected, flat.layout.starts, strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == flat.buffer.data_ptr() + 4 * start


@given(shapes)
def test_a_copy_of_the_parameters_is_independent(sizes: list[tuple[int, ...]]) -> None:
    params, flat = make(sizes)
    copies = copy.deepcopy(params)
    before = [c.detach().clone() for c in copies]
    flat.buffer.zero_()
    assert all(torch.equal(c, b) for c, b in zip(copies, before, strict=True))


@given(shapes)
def test_flat_grad_is_the_gradient_without_a_copy(sizes: list[tuple[int, ...]]) -> None:
    params, _ = make(sizes)
    for p in params:
        assert flat_grad(p, "p") is None
        p.grad = torch.rand(p.shape)
        array = flat_grad(p, "p")
        assert array is not None and array.ctypes.data == p.grad.data_ptr()
        assert np.array_equal(array, p.grad.numpy().reshape(-1))


def test_changes_by_hand_are_noticed() -> None:
    params, flat = make([(3,), (2, 2)])
    flat.mark()
    assert not flat.changed_outside()
    with torch.no_grad():
        params[1].mul_(2)
    assert flat.changed_outside()


def test_another_dtype_is_refused_by_name() -> None:
    params, flat = make([(3,), (2, 2)])
    params[1].data = params[1].data.double()
    with pytest.raises(UsageError, match=r"p1 is now torch\.float64"):
        flat.attach()
