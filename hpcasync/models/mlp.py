"""A perceptron with two hidden layers: 128 and 64 units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Flattened sample, 128, 64, ``classes``, with ReLU; 109 386 parameters for 28 x 28 images and ten
    classes.

    Args:
        shape: of one sample, any.
        classes: the number of outputs.

    Source: Rumelhart, Hinton & Williams 1986, "Learning representations by back-propagating errors"; the widths are ours.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
