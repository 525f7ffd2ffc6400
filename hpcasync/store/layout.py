"""Where each parameter lies in the flat state, and how the state is cut into shards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 16
"""Elements: every parameter starts on a 64-byte boundary."""

SHARD_ELEMENTS = 1 << 19
"""Elements of ``w`` per shard, 2 MB: long enough to hide a lock, short enough that ranks seldom meet in one."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in one shard.

    Attributes:
        param: index of the parameter.
        start: first element in the flat state.
        offset: first element within the parameter.
        size: elements.
    """

    param: int
    start: int
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """Elements ``[start, stop)`` of the flat state, under one lock and one version."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """The flat state.

    Attributes:
        sizes: elements of each parameter.
        starts: first element of each parameter in the flat state.
        total: elements of the flat state, alignment gaps included.
        shards: cover all of it, in order, without overlap.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    total: int
    shards: tuple[Shard, ...]


def make_layout(sizes: Sequence[int], shard_elements: int = SHARD_ELEMENTS) -> Layout:
    """Lay parameters out one after the other and cut the whole into shards of nearly equal size.

    A parameter may span several shards and a shard may hold several parameters.

    Args:
        sizes: elements of each parameter.
        shard_elements: size to aim at; shards end at multiples of ``ALIGN``.
    """
    if not sizes or min(sizes) < 0 or sum(sizes) < 1 or shard_elements < 1:
        raise ValueError(f"sizes={list(sizes)!r}, shard_elements={shard_elements}: expected sizes >= 0, not all 0")
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // ALIGN) * ALIGN
    count = max(1, round(total / shard_elements))
    units = total // ALIGN
    count = min(count, units)
    bounds = [units * k // count * ALIGN for k in range(count + 1)]
    shards = []
    first = 0  # the first parameter that reaches into the current shard
    for lo, hi in itertools.pairwise(bounds):
        pieces = []
        index = first
        while index < len(sizes) and starts[index] < hi:
            begin, end = max(lo, starts[index]), min(hi, starts[index] + sizes[index])
            if begin < end:
                pieces.append(Piece(index, begin, begin - starts[index], end - begin))
            if starts[index] + sizes[index] <= hi:
                first = index + 1
            index += 1
        shards.append(Shard(lo, hi, tuple(pieces)))
    return Layout(tuple(sizes), tuple(starts), total, tuple(shards))
