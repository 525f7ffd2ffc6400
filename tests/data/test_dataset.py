"""Opening: every kind of broken file has its message; good ones survive pickle, fork and replacement."""

from __future__ import annotations

import fcntl
import multiprocessing
import pickle

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpcasync.data import Dataset, ShardSampler, info, open_dataset, write_dataset
from hpcasync.errors import UsageError

from .helpers import arrays, edit, features, swap, world


def test_what_comes_back_is_what_went_in(small):
    dataset = Dataset(small, verify=True)
    given = arrays()
    assert (dataset.name, dataset.classes, dataset.shape) == ("small", 3, (1, 6, 5))
    for key, array in given.by_key().items():
        assert np.array_equal(dataset.array(key), array)
    with pytest.raises(ValueError, match="read-only"):
        dataset.array("train/x")[0] = 0
    assert "50 train, 20 test" in repr(dataset)
    assert open_dataset(dataset) is dataset


@pytest.mark.parametrize(
    "given", [arrays(), features(), arrays(scale=1 / 16)], ids=["images", "features", "scale"]
)
def test_samples_are_normalised(tmp_path, given):
    split = Dataset(write_dataset(tmp_path / "a.h5", given)).as_torch("train")
    x, y = split.batch(np.arange(50))
    scale = given.scale or (1.0 if given.train_x.dtype == np.float32 else 1 / 255)
    axes = (0, 2, 3) if x.ndim == 4 else 0
    stored = given.train_x.astype(np.float64) * scale
    std = stored.std(axis=axes, keepdims=True)
    expected = (stored - stored.mean(axis=axes, keepdims=True)) / np.where(std < 1e-9, 1, std)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-5)
    assert y.tolist() == given.train_y.tolist()


def test_a_split_is_a_torch_data_set(small):
    split = Dataset(small).as_torch("test")
    assert len(split) == 20
    x, y = split[3]
    assert x.shape == (1, 6, 5) and y.shape == () and int(y) == 0
    assert torch.equal(split[-17][0], x)
    with pytest.raises(IndexError):
        split[20]
    with pytest.raises(UsageError, match=r"unknown split 'trian'; did you mean 'train'"):
        Dataset(small).as_torch("trian")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_any_dataloader_with_workers(small, method):
    split = Dataset(small).as_torch("train")
    split[0]  # mapped in the parent already
    sampler = ShardSampler(split, world(1, 3), seed=5)
    found = DataLoader(split, batch_size=4, sampler=sampler, num_workers=1, multiprocessing_context=method)
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    expected_x, expected_y = split.batch(np.asarray(list(ShardSampler(split, world(1, 3), seed=5))))
    assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_a_pickle_carries_the_path_and_no_data(small):
    dataset = Dataset(small)
    dataset.array("train/x")
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert copy._maps == {}
    assert np.array_equal(copy.array("train/x"), dataset.array("train/x"))


def test_a_file_replaced_by_the_same_data_goes_on_and_by_other_data_does_not(small):
    dataset = pickle.loads(pickle.dumps(Dataset(small)))
    write_dataset(small, arrays(source="written again, at other offsets" * 300), overwrite=True)
    assert np.array_equal(dataset.array("train/x"), arrays().train_x)
    write_dataset(small, features(), overwrite=True)
    with pytest.raises(UsageError, match="replaced by other data"):
        pickle.loads(pickle.dumps(dataset)).array("test/x")


def test_forked_readers_share_one_open_set(small):
    dataset = Dataset(small)
    total = int(dataset.array("train/x").sum())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map(dataset.array("train/x").__getitem__, [slice(0, 25), slice(25, 50)])
    assert sum(int(part.sum()) for part in sums) == total


def test_a_reader_takes_no_lock(small):
    with small.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="lock"):
            h5py.File(small, "r", locking=True)
        assert Dataset(small).classes == 3


@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
def test_a_file_that_the_user_has_open(small, locking):
    with h5py.File(small, "r", locking=locking):
        assert Dataset(small).classes == 3


def test_not_found(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.h5: not found"):
        Dataset(tmp_path / "nowhere.h5")
    with pytest.raises(UsageError, match="is a folder"):
        Dataset(tmp_path)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"x,y\n1,2\n", "is not an HDF5 file")])
def test_not_hdf5(tmp_path, content, words):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        Dataset(tmp_path / "a.h5")


def test_truncated(small):
    content = small.read_bytes()
    small.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UsageError, match=r"small.h5 is truncated"):
        Dataset(small)
    small.write_bytes(content[:100])
    with pytest.raises(UsageError, match=r"truncated|cannot be read as HDF5"):
        Dataset(small)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"format": "images"}, "attribute format is 'images', expected 'hpcasync-data'"),
        ({"format": None}, "attribute format is None"),
        ({"version": 2}, "layout version 2, expected 1; update hpcasync"),
        ({"version": "x"}, "attribute version is 'x'"),
        ({"scale": None, "checksum": None}, "lacks scale, checksum"),
        ({"scale": np.nan}, "attribute scale is nan"),
        ({"scale": -1.0}, "must be positive"),
        ({"classes": 2.5}, "attribute classes is 2.5"),
        ({"classes": 2}, r"train/y\[2\] is 2, expected a label from 0 to 1"),
        ({"mean": [0.0, 0.0]}, r"attribute mean has shape \(2,\), expected 1 finite"),
        ({"std": [0.0]}, "must be positive"),
    ],
)
def test_wrong_attributes(small, attributes, words):
    edit(small, **attributes)
    with pytest.raises(UsageError, match=words):
        Dataset(small)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("test/y", None, "lacks test/y"),
        ("train/y", np.zeros(49, np.int64), "50 samples but train/y 49"),
        ("train/y", np.full(50, 3, np.int64), r"train/y\[0\] is 3, expected a label from 0 to 2"),
        ("test/x", np.zeros((20, 1, 6, 6), np.uint8), "expected the same shape"),
        ("test/x", np.zeros((0, 1, 6, 5), np.uint8), "test is empty"),
        ("train/x", np.zeros((50, 1, 6, 5)), "train/x is float64"),
    ],
)
def test_wrong_arrays(small, key, value, words):
    swap(small, key, value)
    with pytest.raises(UsageError, match=words):
        Dataset(small)


def test_compressed_arrays_cannot_be_mapped(small):
    swap(small, "train/x", arrays().train_x, compression="gzip")
    with pytest.raises(UsageError, match="train/x is stored in chunks or compressed"):
        Dataset(small)


def test_nan_on_disk(tmp_path):
    path = write_dataset(tmp_path / "a.h5", features())
    with h5py.File(path, "r+") as file:
        file["test/x"][4, 2] = np.nan
    with pytest.raises(UsageError, match=r"test/x\[4\] holds NaN"):
        Dataset(path)


def test_a_changed_byte_is_found_by_the_checksum(small):
    with h5py.File(small, "r+") as file:
        file["train/x"][9, 0, 0, 0] ^= 1
    Dataset(small)
    for check in (lambda: Dataset(small, verify=True), lambda: info(small)):
        with pytest.raises(UsageError, match="is damaged"):
            check()
    assert info(small, verify=False)["verified"] is False
