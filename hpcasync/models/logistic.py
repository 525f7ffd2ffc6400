"""Multinomial logistic regression: one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def logistic(shape: Sequence[int], classes: int) -> nn.Module:
    """One linear layer over the flattened sample; convex, so every rule has one optimum to find.

    Args:
        shape: of one sample, any.
        classes: the number of outputs.

    Source: Cox 1958, "The regression analysis of binary sequences", for two classes.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
