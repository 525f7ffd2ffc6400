"""Shards are disjoint, complete, balanced and drawn anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcasync.data import ShardSampler, shard
from hpcasync.data.partition import ranks
from hpcasync.errors import UsageError

from .helpers import world

sizes = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 200), st.integers(0, 1000), st.integers(0, 2**40), st.booleans())
def test_shards_are_disjoint_complete_and_balanced(size, more, epoch, seed, shuffle):
    n = size + more
    shards = [shard(n, rank, size, epoch, seed, shuffle=shuffle) for rank in range(size)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(s.dtype == np.int64 for s in shards)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_order_depends_on_seed_and_epoch_and_on_nothing_else(epoch, seed, epoch2, seed2):
    first, again, other = (
        shard(300, 1, 3, epoch, seed),
        shard(300, 1, 3, epoch, seed),
        shard(300, 1, 3, epoch2, seed2),
    )
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == ((epoch, seed) == (epoch2, seed2))


def test_without_shuffle_the_stored_order():
    assert shard(7, 0, 2, shuffle=False).tolist() == [0, 1, 2, 3]
    assert shard(7, 1, 2, 9, shuffle=False).tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 0, 4), "3 samples for 4 ranks"),
        ((9, 4, 4), "rank 4 of 4"),
        ((9, -1, 4), "rank -1 of 4"),
        ((9, 0, 0), "rank 0 of 0"),
        ((9, 0, 1, -1), "epoch is -1"),
        ((9, 0, 1, 0, -5), "seed is -5"),
        ((9, 0, 1, 0.5), "epoch is 0.5"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UsageError, match=words):
        shard(*arguments)


def test_a_world_needs_integer_rank_and_size():
    assert ranks(None) == (0, 1)
    assert ranks(world(np.int32(2), 3)) == (2, 3)
    with pytest.raises(UsageError, match="rank and size"):
        ranks(object())
    with pytest.raises(UsageError, match="rank 3 of 3"):
        ranks(world(3, 3))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 60), st.integers(0, 5))
def test_sampler_gives_every_rank_as_many_and_covers_all(size, more, epoch):
    n = size + more
    seen = set()
    for rank in range(size):
        sampler = ShardSampler(n, world(rank, size), seed=4)
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler) == -(-n // size)
        assert set(own) == set(shard(n, rank, size, epoch, 4).tolist())
        seen |= set(own)
    assert seen == set(range(n))


def test_sampler_epochs_advance_and_can_be_set():
    sampler = ShardSampler(range(40), world(0, 2))
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sampler.epoch == 1


def test_sampler_bad_arguments():
    with pytest.raises(UsageError, match="2 samples for 3 ranks"):
        ShardSampler(2, world(0, 3))
    with pytest.raises(UsageError, match="number of samples is 0"):
        ShardSampler([])
    with pytest.raises(UsageError, match="epoch is None"):
        ShardSampler(2).set_epoch(None)
