"""The layout: every element of every parameter in exactly one shard, aligned, in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcasync.store import make_layout
from hpcasync.store.layout import ALIGN, SHARD_ELEMENTS

sizes_lists = st.lists(st.integers(1, 3000), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(sizes=sizes_lists, shard_elements=st.integers(1, 20000))
@example(sizes=[1], shard_elements=1)
@example(sizes=[16, 16], shard_elements=16)
@example(sizes=[17, 1, 1], shard_elements=16)
def test_everything_exactly_once(sizes: list[int], shard_elements: int) -> None:
    layout = make_layout(sizes, shard_elements)
    covered = [np.zeros(size, int) for size in sizes]
    flat = np.zeros(layout.total, int)
    assert layout.shards[0].start == 0 and layout.shards[-1].stop == layout.total
    for k, shard in enumerate(layout.shards):
        assert shard.start < shard.stop and shard.start % ALIGN == 0 and shard.stop % ALIGN == 0
        assert k == 0 or shard.start == layout.shards[k - 1].stop
        assert shard.pieces, "a shard without a parameter"
        for piece in shard.pieces:
            assert shard.start <= piece.start and piece.start + piece.size <= shard.stop
            assert piece.start == layout.starts[piece.param] + piece.offset
            covered[piece.param][piece.offset : piece.offset + piece.size] += 1
            flat[piece.start : piece.start + piece.size] += 1
    assert all((c == 1).all() for c in covered)
    assert flat.max() == 1 and flat.sum() == sum(sizes)
    assert all(start % ALIGN == 0 for start in layout.starts)
    assert layout.total % ALIGN == 0 and layout.total < sum(sizes) + ALIGN * len(sizes)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_lists, shard_elements=st.integers(64, 20000))
def test_shards_are_nearly_equal(sizes: list[int], shard_elements: int) -> None:
    layout = make_layout(sizes, shard_elements)
    lengths = [s.stop - s.start for s in layout.shards]
    assert max(lengths) - min(lengths) <= ALIGN
    assert max(lengths) <= 1.5 * shard_elements + 2 * ALIGN


def test_default_shards() -> None:
    assert len(make_layout([10]).shards) == 1
    assert len(make_layout([25_000_000]).shards) == round(25_000_000 / SHARD_ELEMENTS)


@pytest.mark.parametrize("sizes, shard", [([], 10), ([0], 10), ([3, -1], 10), ([3], 0)])
def test_refused(sizes: list[int], shard: int) -> None:
    with pytest.raises(ValueError, match="expected sizes >= 0, not all 0"):
        make_layout(sizes, shard)
