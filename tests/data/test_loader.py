"""The loader: every sample once, as many batches on every rank, and an exact resume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcasync.data import Arrays, Dataset, Loader, loader, open_dataset, write_dataset
from hpcasync.errors import UsageError

from .helpers import features, world


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Data sets whose only feature is the number of the sample: {samples: Dataset}."""
    folder = tmp_path_factory.mktemp("numbered")

    def make(n):
        x = np.arange(n, dtype=np.float32)[:, None]
        y = np.arange(n, dtype=np.int64)
        return Dataset(write_dataset(folder / f"{n}.h5", Arrays(x, y, x[:1], y[:1])))

    return {n: make(n) for n in (1, 7, 23, 50)}


def labels(batches):
    return [y.tolist() for _, y in batches]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([1, 7, 23, 50]), st.integers(1, 9), st.integers(1, 60), st.integers(0, 9), st.booleans()
)
def test_every_rank_as_many_batches_and_every_sample_once(numbered, n, size, batch, epoch, shuffle):
    size = min(n, size)
    loaders = [Loader(numbered[n], world(r, size), batch=batch, seed=3, shuffle=shuffle) for r in range(size)]
    for one in loaders:
        one.set_epoch(epoch)
    passes = [labels(one) for one in loaders]
    assert {len(p) for p in passes} == {len(loaders[0])} == {math.ceil(math.ceil(n / size) / batch)}
    assert all(1 <= len(b) <= batch for p in passes for b in p)
    if batch > 1:
        assert sorted(i for p in passes for b in p for i in b) == list(range(n))
    else:
        assert {i for p in passes for b in p for i in b} == set(range(n))


def test_one_rank_and_one_short_shard_repeats_its_own_sample(numbered):
    long, short = (labels(Loader(numbered[7], world(r, 2), batch=1)) for r in (0, 1))
    assert len(long) == len(short) == 4
    assert short[3] == short[0]
    assert {b[0] for b in long} | {b[0] for b in short} == set(range(7))


def test_batches_are_nearly_equal(numbered):
    counts = [len(b) for b in labels(Loader(numbered[50], world(0, 1), batch=16))]
    assert counts == [12, 13, 12, 13]


def test_x_is_normalised_and_belongs_to_y(tmp_path):
    dataset = Dataset(write_dataset(tmp_path / "f.h5", features()))
    seen = 0
    for x, y in loader(dataset, batch=8, split="test"):
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), 7)
        seen += len(y)
    assert seen == 20
    x, y = next(iter(loader(dataset, batch=8, split="test", shuffle=False)))
    expected_x, expected_y = dataset.as_torch("test").batch(np.arange(len(y)))
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_epochs_advance_and_can_be_set(numbered):
    one = Loader(numbered[50], batch=8)
    first, second = labels(one), labels(one)
    assert first != second and one.epoch == 2
    one.set_epoch(0)
    assert labels(one) == first
    other = Loader(numbered[50], batch=8, seed=1)
    assert labels(other) != first


def test_leaving_early_repeats_the_epoch_and_leaving_at_the_last_batch_does_not(numbered):
    one = Loader(numbered[50], batch=8)
    first = labels(one)
    one.set_epoch(0)
    for i, _ in enumerate(one):
        if i == 3:
            break
    assert labels(one) == first
    one.set_epoch(0)
    for i, _ in enumerate(one):
        if i == len(one) - 1:
            break
    assert one.state_dict()["epoch"] == 1
    second = labels(one)
    assert second != first and one.epoch == 2
    one.set_epoch(1)
    assert labels(one) == second


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 30), st.booleans())
def test_resume_continues_exactly(numbered, size, batch, stop, shuffle):
    """Stop after any number of batches, over epochs; a fresh loader goes on with the rest."""
    at = world(size - 1, size)
    whole = Loader(numbered[23], at, batch=batch, seed=8, shuffle=shuffle)
    epochs = 2 + stop // len(whole)
    expected = [b for _ in range(epochs) for b in labels(whole)]

    first = Loader(numbered[23], at, batch=batch, seed=8, shuffle=shuffle)
    got = []
    while len(got) < stop:
        for _, y in first:
            got.append(y.tolist())
            if len(got) == stop:
                break
    state = first.state_dict()
    second = Loader(numbered[23], at, batch=batch, seed=99)
    second.load_state_dict(state)
    assert second.state_dict() == state
    for epoch in range(state["epoch"], epochs):
        second.set_epoch(epoch)  # the usual loop calls it, also for the epoch that is resumed
        got += labels(second)
    assert got == expected


def test_setting_another_epoch_gives_up_the_resumed_position(numbered):
    one = Loader(numbered[50], batch=8)
    one.load_state_dict({**one.state_dict(), "batch": 3})
    one.set_epoch(1)
    assert len(labels(one)) == len(one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 49}, "49 samples"),
        ({"batch": 2, "size": 3}, "size 3, now it is 1"),
        ({"batch": 2, "batch_size": 9}, "batch_size 9, now it is 8"),
        ({"batch": 7}, "at batch 7, but an epoch has 7"),
        ({"batch": -1}, "batch in loader state is -1"),
        ({"epoch": "x"}, "epoch in loader state is 'x'"),
    ],
)
def test_states_that_do_not_fit(numbered, changes, words):
    one = Loader(numbered[50], batch=8)
    with pytest.raises(UsageError, match=words):
        one.load_state_dict({**one.state_dict(), **changes})


def test_a_state_at_the_start_of_an_epoch_fits_other_ranks(numbered):
    one = Loader(numbered[50], world(1, 3), batch=8)
    one.load_state_dict(Loader(numbered[50], batch=9, seed=4).state_dict())
    assert labels(one) == labels(Loader(numbered[50], world(1, 3), batch=8, seed=4))
    with pytest.raises(UsageError, match="lacks batch"):
        one.load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": True}, "batch is True"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"world": world(0, 8)}, "7 samples for 8 ranks"),
        ({"world": "four"}, "rank and size"),
    ],
)
def test_bad_arguments(numbered, options, words):
    with pytest.raises(UsageError, match=words):
        loader(numbered[7], **options)


def test_a_name_a_path_or_an_open_set():
    digits = open_dataset("digits")
    first = [
        next(iter(loader(source)))[1].tolist() for source in ("digits", str(digits.path), digits.path, digits)
    ]
    assert all(f == first[0] for f in first)


@pytest.mark.parametrize("partition", ["iid", [np.arange(0, 20), np.arange(20, 30), np.arange(30, 45), np.arange(45, 50)]])
def test_the_living_take_over_the_share_of_the_dead(numbered, partition):
    dealt = [Loader(numbered[50], world(rank, 4), batch=4, partition=partition) for rank in range(4)]
    left = [dealt[rank].among([0, 3]) for rank in (0, 3)]
    assert len(left[0]) == len(left[1]) == 7
    for mine in left:
        mine.set_epoch(3)
    seen = [np.concatenate(mine.indices()) for mine in left]
    if partition == "iid":
        assert sorted(np.concatenate(seen)) == list(range(50))
        again = [np.concatenate(Loader(numbered[50], world(rank, 2), batch=4).indices()) for rank in (0, 1)]
        assert [len(s) for s in again] == [len(s) for s in seen]
    else:  # each its own part, and half of both parts that are left over
        own = [{*range(33)}, {*range(33, 50)}]
        for mine, part in zip(left, own, strict=True):
            met = set()
            for epoch in range(4):
                mine.set_epoch(epoch)
                met |= {int(i) for indices in mine.indices() for i in indices}
            assert met == part
