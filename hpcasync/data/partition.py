"""Who reads what: disjoint shards of the samples, drawn anew every epoch, agreed without a message."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcasync.errors import UsageError


class World(Protocol):
    """What the data layer needs to know of the ranks."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """The number of ranks."""


def ranks(world: World | None) -> tuple[int, int]:
    """``(rank, size)`` of ``world``; None is one rank.

    Raises:
        UsageError: an object without them, or a rank outside the size.
    """
    if world is None:
        return 0, 1
    rank, size = getattr(world, "rank", None), getattr(world, "size", None)
    if not _whole(rank) or not _whole(size):
        raise UsageError(
            f"world is {world!r}, expected an object with the integers rank and size, such as "
            "hpcasync.init() returns, or None"
        )
    _check_rank(int(rank), int(size))  # type: ignore[arg-type]
    return int(rank), int(size)  # type: ignore[arg-type]


def shard(
    n: int, rank: int, size: int, epoch: int = 0, seed: int = 0, *, shuffle: bool = True
) -> NDArray[np.int64]:
    """The samples of ``rank`` in ``epoch``, in the order to read them.

    The shards of all ranks are disjoint, cover every sample, and differ by at most one in length: one
    permutation, drawn from ``(seed, epoch)``, is cut into ``size`` runs.

    Args:
        n: the number of samples.
        rank: from 0.
        size: the number of ranks.
        epoch: from 0.
        seed: from 0.
        shuffle: False keeps the stored order.

    Returns:
        int64 ``(n // size,)`` or one longer.

    Raises:
        UsageError: fewer samples than ranks, or a number out of range.
    """
    check_number("epoch", epoch, 0)
    check_number("seed", seed, 0)
    start, stop = bounds(n, rank, size)
    if not shuffle:
        return np.arange(start, stop, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(n)[start:stop].astype(np.int64, copy=False)


def bounds(n: int, rank: int, size: int) -> tuple[int, int]:
    """First and last-plus-one position of ``rank`` when ``n`` samples are cut into ``size`` runs.

    Raises:
        UsageError: fewer samples than ranks, or a rank outside the size.
    """
    _check_rank(rank, size)
    if n < size:
        raise UsageError(
            f"{n} samples for {size} ranks, expected at least one sample per rank; use at most {n} ranks "
            "or more data"
        )
    base, extra = divmod(n, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def check_batch(batch: int, n: int, size: int) -> None:
    """Refuse a batch that no rank could fill, when ``n`` samples are cut into ``size`` runs.

    Raises:
        UsageError: fewer samples than ranks, or the batch is larger than the largest run.
    """
    bounds(n, 0, size)
    share = -(-n // size)
    if batch > share:
        raise UsageError(
            f"batch {batch} is larger than the share of each of {size} rank(s), {share} of {n} samples; use a batch of at most "
            f"{share}" + (", or fewer ranks" if size > 1 else "")
        )


def check_number(name: str, value: Any, least: int) -> int:
    """``value`` as an int.

    Raises:
        UsageError: it is no whole number, or below ``least``.
    """
    if not _whole(value) or value < least:
        raise UsageError(f"{name} is {value!r}, expected a whole number from {least}")
    return int(value)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise UsageError(
            f"rank {rank} of {size} ranks, expected a rank from 0 to size - 1 and at least one rank"
        )
