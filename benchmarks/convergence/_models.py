"""A model of the recipes: small, since a table needs thousands of runs. From this folder also ``--model _models:small``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def small(shape: Sequence[int], classes: int) -> nn.Module:
    """A perceptron with one hidden layer of 32 and ReLU: 25 450 parameters for 28 x 28 images and ten classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 32), nn.ReLU(), nn.Linear(32, classes))
