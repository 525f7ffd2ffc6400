"""Partitions: every sample once, at most C classes, no worker empty; the loader reads its own part evenly."""

from __future__ import annotations

import json
from collections import Counter

import h5py
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpcasync.cli import main
from hpcasync.data import Loader, load_partition, loader, make_partition, open_dataset, save_partition, write_dataset
from hpcasync.errors import UsageError

from .helpers import arrays, images, world

labels_of = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(np.array)
LABELS = np.arange(120) % 6


def used_once(parts, n):
    return sorted(np.concatenate(parts).tolist()) == list(range(n)) and all(len(p) for p in parts)


@settings(max_examples=150, deadline=None)
@given(labels_of, st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**40))
def test_shards_have_at_most_c_classes(labels, workers, c, seed):
    classes = len(np.unique(labels))
    total = workers * c
    try:
        parts = make_partition(f"shards:{c}", labels, workers, seed)
    except UsageError:
        assert c > classes or total < classes or total > len(labels)
        return
    assert used_once(parts, len(labels)) and len(parts) == workers
    seen = [len(np.unique(labels[p])) for p in parts]
    assert max(seen) <= c
    if np.bincount(labels).max() * c <= len(labels) - total:  # no class needs more shards than there are workers
        assert min(seen) == c
    assert all(p.dtype == np.int64 for p in parts)
    again = make_partition(f"shards:{c}", labels, workers, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=80, deadline=None)
@given(labels_of, st.integers(1, 8), st.floats(0.05, 1000), st.integers(0, 2**40))
def test_dirichlet_uses_every_sample(labels, workers, alpha, seed):
    assume(len(labels) >= workers)
    try:
        parts = make_partition(f"dirichlet:{alpha}", labels, workers, seed)
    except UsageError as error:
        assert "without samples in each of 100 draws" in str(error)
        return
    assert used_once(parts, len(labels))


def test_small_alpha_is_far_from_iid_and_large_alpha_near():
    labels = np.arange(10_000) % 10

    def distance(spec):
        shares = [np.bincount(labels[p], minlength=10) / len(p) for p in make_partition(spec, labels, 8, 3)]
        return np.abs(np.array(shares) - 0.1).sum(axis=1).mean()

    far, near = distance("dirichlet:0.05"), distance("dirichlet:1000")
    assert far > 1 and near < 0.1 and distance("iid") < 0.2


@given(labels_of, st.integers(1, 8), st.integers(0, 99))
def test_iid_is_balanced(labels, workers, seed):
    assume(len(labels) >= workers)
    parts = make_partition("iid", labels, workers, seed)
    assert used_once(parts, len(labels)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_equal_classes_give_equal_shares():
    parts = make_partition("shards:2", np.arange(600) % 6, 12, 0)
    assert [len(p) for p in parts] == [50] * 12
    assert {len(np.unique(p % 6)) for p in parts} == {2}
    other = make_partition("shards:2", np.arange(600) % 6, 12, 1)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize(
    ("spec", "workers", "words"),
    [
        ("", 2, "expected iid, shards:C"),
        ("shard:2", 2, "expected iid, shards:C"),
        ("shards", 2, "expected iid, shards:C"),
        ("shards:two", 2, "expected iid, shards:C"),
        ("shards:1.5", 2, "expected iid, shards:C"),
        ("iid:2", 2, "expected iid, shards:C"),
        ("shards:0", 2, "at least 1 class"),
        ("shards:7", 2, "7 classes per worker, but the data have 6"),
        ("shards:2", 2, "see 4 of the 6 classes; use at least 3 classes per worker, or 3 workers"),
        ("shards:2", 100, "200 shards for 120 samples"),
        ("iid", 121, "120 samples for 121 workers"),
        ("iid", 0, "workers is 0"),
        ("dirichlet:0", 2, "ALPHA > 0"),
        ("dirichlet:-1", 2, "ALPHA > 0"),
        ("dirichlet:nan", 2, "ALPHA > 0"),
        ("dirichlet:inf", 2, "ALPHA > 0"),
        ("dirichlet:1e-4", 60, "leaves a worker without samples in each of 100 draws"),
        ("natural", 2, "give the data set"),
        ("file:nowhere.h5", 2, "not found"),
    ],
)
def test_bad_specs(spec, workers, words):
    with pytest.raises(UsageError, match=words):
        make_partition(spec, LABELS, workers)


def test_bad_labels_and_batch():
    with pytest.raises(UsageError, match="labels are float64"):
        make_partition("iid", np.zeros(3), 2)
    with pytest.raises(UsageError, match="batch 61 is larger than the share of worker 0, 60 samples"):
        make_partition("iid", LABELS, 2, batch=61)
    assert make_partition("iid", LABELS, 2, batch=60)


def test_saved_and_loaded(tmp_path):
    parts = make_partition("shards:2", LABELS, 12, 5)
    path = save_partition(tmp_path / "deep" / "p.h5", parts, 120, checksum="sha256:a", spec="shards:2")
    again = make_partition(f"file:{path}", LABELS, 12)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    with h5py.File(path) as file:
        assert file.attrs["checksum"] == b"sha256:a" and file.attrs["spec"] == b"shards:2"
        assert file["parts/0"].dtype == np.int64
    for change, words in (
        ({"workers": 11}, "12 parts, expected one for each of 11 workers"),
        ({"samples": 121}, "partition of 120 samples, expected 121"),
        ({"checksum": "sha256:b"}, "other data"),
    ):
        with pytest.raises(UsageError, match=words):
            load_partition(path, **{"workers": 12, "samples": 120, **change})


def test_files_that_are_no_partition(tmp_path):
    with pytest.raises(UsageError, match="sample 3 is dealt 2 times"):
        save_partition(tmp_path / "p.h5", [[1, 3], [3]], 5)
    with pytest.raises(UsageError, match="worker 1 of 2 without samples"):
        save_partition(tmp_path / "p.h5", [[1, 3], []], 5)
    with pytest.raises(UsageError, match="has sample 5, expected indices from 0 to 4"):
        save_partition(tmp_path / "p.h5", [[1, 5]], 5)
    text = tmp_path / "text.h5"
    text.write_text("no")
    with pytest.raises(UsageError, match="cannot be read"):
        load_partition(text, 1, 5)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(UsageError, match="holds no partition"):
        load_partition(tmp_path / "other.h5", 1, 5)
    np.savez(tmp_path / "a.npz", a0=np.array([0.5]))
    with pytest.raises(UsageError, match="float64"):
        load_partition(tmp_path / "a.npz", 1, 5)


def test_npz_parts_come_in_the_order_of_their_numbers(tmp_path):
    np.savez(tmp_path / "p.npz", **{f"w{i}": np.array([i, i + 11]) for i in reversed(range(11))})
    parts = make_partition(f"file:{tmp_path / 'p.npz'}", np.zeros(22, np.int64), 11)
    assert [p.tolist() for p in parts] == [[i, i + 11] for i in range(11)]


def test_natural_groups_are_dealt_whole_and_evenly(small, tmp_path):
    dataset = open_dataset(small)
    with pytest.raises(UsageError, match="holds no partition"):
        make_partition("natural", dataset, 2)
    groups = np.repeat([7, 3, 9, 1], [20, 15, 10, 5])
    with h5py.File(small, "r+") as file:
        file["train/part"] = groups
    dataset = open_dataset(small)
    parts = make_partition("natural", dataset, 2)
    assert [sorted({int(g) for g in groups[p]}) for p in parts] == [[1, 7], [3, 9]]
    assert used_once(make_partition(f"file:{small}", dataset, 4), 50)
    with pytest.raises(UsageError, match="4 groups for 5 workers"):
        make_partition("natural", dataset, 5)
    np.savez(tmp_path / "g.npz", part=groups[1:])
    with pytest.raises(UsageError, match=r"shape \(49,\), expected \(50,\)"):
        make_partition(f"file:{tmp_path / 'g.npz'}", dataset, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9))
def test_the_loader_reads_its_own_part_evenly(cut, batch, seed):
    dataset = DATASET[0]
    parts = [np.arange(cut), np.arange(cut, 61)]
    batch = min(batch, cut, 61 - cut) or 1
    both = [Loader(dataset, world(r, 2), batch=batch, seed=seed, partition=parts) for r in (0, 1)]
    assert len({len(r) for r in both}) == 1
    for rank, mine in enumerate(both):
        seen = Counter({int(i): 0 for i in parts[rank]})
        for epoch in range(7):
            mine.set_epoch(epoch)
            batches = mine.indices()
            assert len(batches) == len(mine) and all(0 < len(b) <= batch for b in batches)
            assert sum(map(len, batches)) == 31
            seen.update(np.concatenate(batches).tolist())
            assert max(seen.values()) - min(seen.values()) <= 1
        assert set(seen) == set(parts[rank].tolist())


DATASET: list = []


@pytest.fixture(autouse=True, scope="module")
def _dataset(tmp_path_factory):
    x, y = images(61)
    DATASET[:] = [open_dataset(write_dataset(tmp_path_factory.mktemp("p") / "d.h5", arrays(train_x=x, train_y=y)))]


def test_loader_spec_iid_is_the_default_and_errors(small):
    plain, iid = loader(small, world(1, 2)), loader(small, world(1, 2), partition="iid")
    assert all(np.array_equal(a, b) for a, b in zip(plain.indices(), iid.indices(), strict=True))
    with pytest.raises(UsageError, match="3 parts, expected one for each of 2 ranks"):
        loader(small, world(0, 2), partition=[[1], [2], [3]])
    with pytest.raises(UsageError, match="batch 30 is larger"):
        loader(small, world(0, 2), batch=30, partition="shards:2")
    shards = loader(small, world(0, 2), batch=5, partition="shards:2", seed=3)
    own = make_partition("shards:2", open_dataset(small), 2, 3)[0]
    assert set(np.concatenate(shards.indices()).tolist()) <= set(own.tolist())
    stored = loader(small, world(0, 2), batch=5, partition="shards:2", seed=3, shuffle=False)
    assert np.array_equal(np.resize(own, 25), np.concatenate(stored.indices()))


def test_loader_resumes_inside_an_epoch_of_a_partition(small):
    def make(partition, seed=3):
        return loader(small, world(0, 2), batch=5, partition=partition, seed=seed)

    first = make("shards:2")
    first.set_epoch(1)
    batches = iter(first)
    next(batches)
    next(batches)
    state = first.state_dict()
    rest = [y.tolist() for _, y in batches]
    again = make("shards:2", seed=0)  # the seed, and with it the partition, comes from the state
    again.load_state_dict(state)
    assert [y.tolist() for _, y in again] == rest
    with pytest.raises(UsageError, match="another partition"):
        make("shards:3").load_state_dict(state)
    with pytest.raises(UsageError, match="another partition"):
        make("iid").load_state_dict(state)
    make("shards:3").load_state_dict({**state, "batch": 0})


def test_info_draws_and_saves(small, tmp_path, capsys):
    picture, saved = tmp_path / "a" / "p.png", tmp_path / "p.h5"
    common = ["data", "info", str(small), "--workers", "3", "--json"]
    assert main([*common, "--partition", "shards:2", "--plot", str(picture), "--save", str(saved)]) == 0
    made = json.loads(capsys.readouterr().out)["partition"]
    assert np.sum(made["class_counts"]) == 50 and np.shape(made["class_counts"]) == (3, 3)
    assert (np.array(made["class_counts"]) > 0).sum(axis=1).tolist() == [2, 2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert main([*common, "--partition", f"file:{saved}"]) == 0
    assert json.loads(capsys.readouterr().out)["partition"]["class_counts"] == made["class_counts"]
    assert main([*common[:-1], "--partition", "shards:2", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "worker 2:" in shown and shown.count("written") == 1


def test_picture_of_many_classes_and_workers(tmp_path):
    from hpcasync.data.partition_plot import class_counts, plot_partition

    labels = np.arange(3000) % 50
    counts = class_counts(make_partition("dirichlet:0.5", labels, 100), labels, 50)
    assert plot_partition(counts, tmp_path / "p.png").stat().st_size > 5000
    with pytest.raises(UsageError, match=r"ends in .png"):
        plot_partition(counts, tmp_path / "p.nope")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "p.png"], "--plot needs a partition"),
        (["--save", "p.h5"], "--save needs a partition"),
        (["--partition", "shards:9"], "9 classes per worker, but the data have 3"),
        (["--partition", "iid", "--workers", "0"], "workers is 0"),
        (["--partition", "iid", "--seed", "-1"], "seed is -1"),
    ],
)
def test_info_bad_input(small, capsys, arguments, words):
    assert main(["data", "info", str(small), *arguments]) == 2
    assert words in capsys.readouterr().err
