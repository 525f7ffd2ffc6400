"""Large gradients are looked at during backward; what changes them afterwards is noticed."""

from __future__ import annotations

import pytest
import torch

import hpcasync as ha
from hpcasync.comm import World
from hpcasync.modes.finite import HOOK_ELEMENTS


def make() -> tuple[torch.nn.Parameter, ha.Async]:
    """A parameter large enough to be looked at during backward."""
    p = torch.nn.Parameter(torch.ones(HOOK_ELEMENTS))
    return p, ha.Async([p], ha.rules.ASGD(lr=1.0), world=World())


@pytest.mark.filterwarnings("ignore:rank 0")
@pytest.mark.parametrize("when", ["backward", "clipping", "second backward", "by hand", "after a step without"])
def test_a_nan_is_found_wherever_it_comes_from(when: str) -> None:
    p, opt = make()
    opt.zero_grad()
    (p * (float("nan") if when == "backward" else 1.0)).sum().backward()
    assert p.grad is not None
    if when == "clipping":
        p.grad.mul_(float("inf")).mul_(0.0)
    elif when == "second backward":
        (p[3] * float("nan")).backward()
    elif when == "by hand":
        p.grad = torch.full_like(p, float("nan"))
    elif when == "after a step without":
        address = p.grad
        p.grad = None
        opt.step()
        p.grad = address
        p.grad[5] = float("inf")
    opt.step()
    assert opt.skipped == 1 and torch.equal(p, torch.ones_like(p))
    opt.zero_grad()
    p.sum().backward()
    opt.step()
    assert opt.skipped == 1 and torch.equal(p, torch.zeros_like(p))
