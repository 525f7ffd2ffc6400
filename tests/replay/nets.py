"""Small models for digits: one that draws random numbers and has buffers, one with a frozen layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def norm(shape: Sequence[int], classes: int) -> nn.Module:
    """Convolution, BatchNorm, dropout."""
    front = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
    return nn.Sequential(*front, nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, classes))


class Frozen(nn.Module):
    """A layer in the middle without gradients: whole shards are only read."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 40), nn.Linear(40, 40), nn.Linear(40, classes)
        self.middle.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x.flatten(1))))))


def frozen(shape: Sequence[int], classes: int) -> nn.Module:
    """``Frozen``."""
    return Frozen(classes)
