"""Cut one set of samples into a training and a test part, and turn labels into class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.errors import UsageError


def stratified(
    where: object, y: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions of the training and test samples, each class cut in the same proportion, in their old order.

    Args:
        where: the source, for messages.
        y: labels ``(N,)``.
        fraction: the part that becomes the test split, between 0 and 1.
        seed: of the choice; the same seed gives the same split.

    Raises:
        UsageError: a fraction outside (0, 1), or so few samples that one part is empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"test_fraction is {fraction}, expected a number between 0 and 1 such as 0.2")
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected a whole number from 0")
    rng = np.random.default_rng(seed)
    test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        test[members[: round(len(members) * fraction)]] = True
    if test.all() or not test.any():
        raise UsageError(
            f"{where}: {len(y)} samples cannot be cut into training and test parts with test_fraction "
            f"{fraction}, expected at least one in each; give another fraction or more data"
        )
    return np.flatnonzero(~test), np.flatnonzero(test)


def encode_labels(where: object, values: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class numbers of text labels, and the class names when the labels were not numbers 0, 1, ... already.

    Raises:
        UsageError: labels that are fractions: a regression target, not classes.
    """
    try:
        numbers = np.asarray([float(v) for v in values])
    except ValueError:
        names = sorted(set(values))
        at = {name: i for i, name in enumerate(names)}
        return np.asarray([at[v] for v in values], dtype=np.int64), tuple(names)
    if not np.isfinite(numbers).all() or (numbers != np.floor(numbers)).any():
        bad = next(v for v, n in zip(values, numbers, strict=True) if not np.isfinite(n) or n != np.floor(n))
        raise UsageError(
            f"{where}: label {bad!r} is no class, expected whole numbers or names; choose another label "
            "column"
        )
    whole = numbers.astype(np.int64)
    distinct = np.unique(whole)
    if len(distinct) == distinct[-1] + 1 and distinct[0] == 0:
        return whole, ()
    return np.searchsorted(distinct, whole).astype(np.int64), tuple(str(v) for v in distinct)
