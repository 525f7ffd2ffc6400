"""Small models and problems for the tests of the modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.modes import Async, KStep, Mode, Sync

MODES = ("async", "sync", "kstep")


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(step: int, rank: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1000 * step + rank + 1)
    x = torch.randn(size, 6, generator=rng)
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


def make(mode: str, model: nn.Module, world: World | None, lr: float = 0.05, **options: Any) -> Mode:
    """A mode with momentum inside (state to save), ready to train ``model``."""
    if mode == "async":
        return Async(model, rules.TrendSmooth(base="momentum", lr=lr), world=world, **options)
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if mode == "sync":
        return Sync(inner, world=world, model=model, **options)
    return KStep(inner, world=world, model=model, **({"every": 3, "block_momentum": 0.5} | options))


def train(
    opt: Mode, model: nn.Module, steps: range, rank: int = 0, after: Callable[[], None] = lambda: None
) -> float:
    """Plain training loop; returns the last loss."""
    loss = torch.zeros(())
    for step in steps:
        x, y = batch(step, rank)
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        after()
    return loss.item()


def flat(model: nn.Module) -> np.ndarray:
    """A copy of all parameters, as bits."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy().view(np.int32)


def set_grads(model: nn.Module, value: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
