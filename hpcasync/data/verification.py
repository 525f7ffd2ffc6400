"""A few training samples to verify updates with, as guided SGD does."""

from __future__ import annotations

import numpy as np
import torch

from hpcasync.data.dataset import Dataset
from hpcasync.data.partition import check_number
from hpcasync.errors import UsageError


def verification_batch(
    dataset: Dataset, samples: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random samples of the training split, the same on every rank, as ``(x, y)``. They stay in the training data.

    Args:
        dataset: an open data set.
        samples: how many; None takes a tenth of the training data, at most 100 (the default of the authors of guided SGD).
        seed: of the draw.

    Raises:
        UsageError: more samples than there are.
    """
    split = dataset.as_torch("train")
    count = max(1, min(100, len(split) // 10)) if samples is None else check_number("verification", samples, 1)
    if count > len(split):
        raise UsageError(f"verification set of {count} samples, but the training data have {len(split)}; use fewer")
    rng = np.random.default_rng([check_number("seed", seed, 0), 0x6755])  # not the order of any epoch
    return split.batch(np.sort(rng.choice(len(split), count, replace=False)).astype(np.int64))
