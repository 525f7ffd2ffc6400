"""Loss and accuracy on the test split, each rank its share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hpcasync.comm import World
from hpcasync.data import Dataset

BATCH = 512


def evaluate(model: nn.Module, dataset: Dataset, world: World) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) of ``model`` over the whole test split. Collective.

    The model must be the same on all ranks (``synchronize()`` first). Dropout is off and BatchNorm uses its statistics.
    """
    samples = dataset.as_torch("test")
    count = len(samples)
    share = np.arange(count)[count * world.rank // world.size : count * (world.rank + 1) // world.size]
    sums = np.zeros(3)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(share), BATCH):
            x, y = samples.batch(share[start : start + BATCH])
            x, y = x.to(world.device), y.to(world.device)
            scores = model(x)
            sums += (
                F.cross_entropy(scores, y, reduction="sum").item(),
                (scores.argmax(1) == y).sum().item(),
                len(y),
            )
    model.train(training)
    world.collectives.allreduce(sums)
    return sums[0] / sums[2], sums[1] / sums[2]
