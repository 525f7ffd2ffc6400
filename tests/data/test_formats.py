"""Importing each public format, and each way a file can be wrong."""

from __future__ import annotations

import gzip
import os
import pickle
import pickletools
import tarfile

import numpy as np
import pytest

from hpcasync.data import Dataset, import_dataset
from hpcasync.errors import UsageError

from . import helpers as h


def imported(src, tmp_path, **options):
    return Dataset(import_dataset(src, tmp_path / "out.h5", **options), verify=True)


def refused(src, tmp_path, words, **options):
    with pytest.raises(UsageError, match=words):
        import_dataset(src, tmp_path / "out.h5", **options)
    assert not (tmp_path / "out.h5").exists()


# IDX


@pytest.mark.parametrize("compress", [True, False])
def test_idx(tmp_path, compress):
    found = imported(
        h.idx_folder(tmp_path / "raw", compress=compress), tmp_path, name="tiny", source="made up"
    )
    x, y = h.images(30)
    assert np.array_equal(found.array("train/x"), x) and np.array_equal(found.array("train/y"), y)
    assert np.array_equal(found.array("test/x"), h.images(10, seed=1)[0])
    assert (found.name, found.header.source, found.classes) == ("tiny", "made up", 3)


def change(content, at, new):
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("part", "edit", "words"),
    [
        (
            "train-images-idx3",
            lambda b: change(b, 3, b"\x01"),
            "magic number 0x00000801, expected 0x00000803",
        ),
        ("t10k-labels-idx1", lambda b: change(b, 3, b"\x03"), "magic number 0x00000803, expected 0x00000801"),
        ("train-images-idx3", lambda b: b[:-7], "is truncated: 909 bytes, expected 916"),
        ("train-images-idx3", lambda b: b[:9], "is truncated"),
        ("train-labels-idx1", lambda b: b + b"\0", "is too long"),
        ("train-labels-idx1", lambda b: b"", "magic number"),
        ("train-labels-idx1", lambda b: h.idx_bytes(np.zeros(29)), "30 images but .* 29 labels"),
    ],
)
def test_idx_wrong_files(tmp_path, part, edit, words):
    folder = h.idx_folder(tmp_path / "raw", compress=False)
    path = folder / f"{part}-ubyte"
    path.write_bytes(edit(path.read_bytes()))
    refused(folder, tmp_path, words, kind="idx")


def test_idx_damaged_gzip_and_missing_file(tmp_path):
    folder = h.idx_folder(tmp_path / "raw")
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused(folder, tmp_path, "train-images-idx3-ubyte.gz is truncated or damaged")
    path.write_bytes(change(whole, 40, b"\xff\xff\xff"))
    refused(folder, tmp_path, "train-images-idx3-ubyte.gz is truncated or damaged")
    path.write_bytes(gzip.compress(gzip.decompress(whole)))
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    refused(folder, tmp_path, "lacks t10k-labels-idx1-ubyte")
    refused(path, tmp_path, "is a file, expected the folder", kind="idx")


# CIFAR


@pytest.mark.parametrize("py2", [True, False])
@pytest.mark.parametrize("archive", [True, False])
def test_cifar10(tmp_path, py2, archive):
    files = h.cifar10_files(py2=py2)
    src = h.archive_of(tmp_path / "c.tar.gz", files) if archive else h.folder_of(tmp_path / "raw", files)
    found = imported(src, tmp_path)
    parts = [h.images(4, seed=i, shape=(3072,), classes=10) for i in range(6)]
    assert np.array_equal(found.array("train/x").reshape(20, -1), np.concatenate([x for x, _ in parts[:5]]))
    assert np.array_equal(found.array("test/x").reshape(4, -1), parts[5][0])
    assert np.array_equal(found.array("test/y"), parts[5][1])
    assert (found.name, found.classes, found.shape) == ("cifar-10", 10, (3, 32, 32))
    assert found.header.class_names[3] == "kind 3"
    assert found.header.mean.shape == (3,)


def test_the_handmade_python_2_pickle_is_one():
    x, y = h.images(2, shape=(3072,), classes=10)
    loaded = pickle.loads(h.py2_pickle(x, y.tolist()), encoding="bytes")
    assert np.array_equal(loaded[b"data"], x) and loaded[b"labels"] == y.tolist()


def test_cifar100(tmp_path):
    x, _ = h.images(6, shape=(3072,))
    files = {
        "train": h.py2_pickle(x, [0, 99, 5, 6, 7, 8], b"fine_labels"),
        "test": pickle.dumps({"data": x[:2], "fine_labels": [1, 2], "coarse_labels": [0, 0]}),
        "meta": pickle.dumps({"fine_label_names": [f"n{i}" for i in range(100)]}),
    }
    found = imported(h.folder_of(tmp_path / "raw", files), tmp_path)
    assert (found.name, found.classes) == ("cifar-100", 100)
    assert found.array("train/y").tolist() == [0, 99, 5, 6, 7, 8]
    assert found.header.class_names[99] == "n99"


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    evil = pickle.dumps({"data": Evil(os.mkdir, str(mark)), "labels": []}, protocol=protocol)
    files = {**h.cifar10_files(), "data_batch_3": evil}
    refused(
        h.folder_of(tmp_path / "raw", files), tmp_path, r"data_batch_3: this pickle asks to run \w+.mkdir"
    )
    assert not mark.exists()
    pickle.loads(evil)  # the same bytes do run in the usual unpickler: the test has teeth
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.core.multiarray.scalar"]
)
def test_no_other_function_can_be_reached(tmp_path, name):
    module, _, function = name.rpartition(".")
    content = f"c{module}\n{function}\n.".encode()
    assert [opcode.name for opcode, _, _ in pickletools.genops(content)] == ["GLOBAL", "STOP"]
    refused(
        h.folder_of(tmp_path / "raw", {**h.cifar10_files(), "test_batch": content}),
        tmp_path,
        f"asks to run {name}",
    )


def cifar_batch(**entries):
    x, y = h.images(4, shape=(3072,), classes=10)
    return pickle.dumps({"data": x, "labels": y.tolist(), **entries})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated, damaged or no pickle"),
        (cifar_batch()[:-500], "truncated, damaged or no pickle"),
        (b"no pickle at all", "truncated, damaged or no pickle"),
        (pickle.dumps([1]), "holds a list, expected a dictionary"),
        (pickle.dumps({"data": 1}), "expected data and labels"),
        (cifar_batch(labels=[1]), "4 images and labels of shape"),
        (cifar_batch(labels=["a"] * 4), "no class numbers"),
        (cifar_batch(data=np.zeros((4, 3072), np.float32)), "data is float32"),
        (cifar_batch(data=np.zeros((4, 1024), np.uint8)), r"uint8 \(4, 1024\)"),
        (
            cifar_batch(data=np.array([{}, None, "a", 2], object)),
            "truncated, damaged or no pickle of plain data",
        ),
    ],
)
def test_cifar_wrong_batches(tmp_path, content, words):
    files = {**h.cifar10_files(), "data_batch_2": content}
    refused(h.folder_of(tmp_path / "raw", files), tmp_path, f"data_batch_2.*{words}")


def test_cifar_missing_batch_and_bad_labels(tmp_path):
    files = h.cifar10_files()
    files["test_batch"] = cifar_batch(labels=[0, 1, 10, 2])
    refused(
        h.folder_of(tmp_path / "raw", files), tmp_path, r"test/y\[2\] is 10, expected a label from 0 to 9"
    )
    (tmp_path / "raw" / "data_batch_4").unlink()
    refused(tmp_path / "raw", tmp_path, "lacks data_batch_4")


def test_an_archive_writes_nothing_outside_and_follows_no_link(tmp_path):
    files = {f"../../up/{name}": content for name, content in h.cifar10_files().items()}
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    imported(h.archive_of(folder / "c.tar.gz", files), folder)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["c.tar.gz", "out.h5"]
    link = tarfile.TarInfo("data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        tar.addfile(link)
    refused(tmp_path / "link.tar", tmp_path, "lacks data_batch_1")


def test_archives_that_are_none(tmp_path):
    whole = h.archive_of(tmp_path / "c.tar.gz", h.cifar10_files(n=40)).read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "c.tar.gz", tmp_path, "c.tar.gz is truncated, damaged or no tar")
    (tmp_path / "c.tar.gz").write_bytes(b"<html>not found</html>")
    refused(tmp_path / "c.tar.gz", tmp_path, "c.tar.gz is truncated, damaged or no tar")
    refused(h.archive_of(tmp_path / "d.tar.gz", {"readme": b"hello"}), tmp_path, "lacks data_batch_1")


# CSV


def csv_file(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def rows(n=20, label=lambda i: i % 2):
    return "".join(f"{i},{i / 2},{label(i)}\n" for i in range(n))


def test_csv_without_header(tmp_path):
    found = imported(csv_file(tmp_path, rows()), tmp_path, test_fraction=0.3, seed=1)
    assert (found.shape, found.classes) == ((2,), 2)
    x = np.concatenate([found.array("train/x"), found.array("test/x")])
    y = np.concatenate([found.array("train/y"), found.array("test/y")])
    assert sorted(x[:, 0].tolist()) == list(range(20))
    assert np.array_equal(x[:, 1], x[:, 0] / 2) and np.array_equal(y, x[:, 0] % 2)
    assert np.bincount(found.array("test/y")).tolist() == [3, 3]


def test_csv_split_depends_on_the_seed_only(tmp_path):
    src = csv_file(tmp_path, rows())
    one, again, other = (
        imported(src, tmp_path / folder, seed=seed).array("test/x").tolist()
        for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("options", "column"), [({}, 1), ({"label": "a"}, 0), ({"label": -1}, 2), ({"label": "2"}, 2)]
)
def test_csv_label_column(tmp_path, options, column):
    text = "a,label,b\n" + "".join(f"{i % 2},{i % 3},{i % 5}\n" for i in range(60))
    found = imported(csv_file(tmp_path, text), tmp_path, **options)
    assert found.classes == (2, 3, 5)[column]


def test_csv_named_and_numbered_classes(tmp_path):
    src = csv_file(tmp_path, "w,h,kind\n" + rows(label=lambda i: ("dog", "cat")[i % 2]))
    found = imported(src, tmp_path)
    assert found.header.class_names == ("cat", "dog")
    x, y = found.array("train/x"), found.array("train/y")
    assert np.array_equal(y, 1 - x[:, 0] % 2)
    src = csv_file(tmp_path, rows(label=lambda i: 5 + 5 * (i % 2)))
    found = Dataset(import_dataset(src, tmp_path / "b.h5"))
    assert (found.classes, found.header.class_names) == (2, ("5", "10"))


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "table.csv is empty"),
        ("a,label\n", {}, "a header and no samples"),
        (rows() + "1,2\n", {}, "line 21: 2 fields, expected 3"),
        (rows() + "1,x,0\n", {}, "line 21: 'x' is no number"),
        (rows() + "1,,0\n", {}, "line 21: '' is no number"),
        (rows() + "1,2,\n", {}, "line 21: the label is empty"),
        (rows() + "1,nan,0\n", {}, "line 21: NaN"),
        (rows() + "1,1e300,0\n", {}, "line 21: NaN, infinity or a number too large"),
        (rows(label=lambda i: i / 4), {}, "label '0.25' is no class"),
        ("1\n2\n", {}, "one column"),
        (
            "a,label\n" + "1,0\n" * 9,
            {"label": "lable"},
            "unknown label column .* 'lable'; did you mean 'label'",
        ),
        (rows(), {"label": "kind"}, "has no header"),
        (rows(), {"label": 3}, "label column 3, expected 0 to 2"),
        (rows(), {"test_fraction": 1.5}, "test_fraction is 1.5"),
        (rows(2), {}, "cannot be cut"),
        (rows(), {"seed": -1}, "seed is -1"),
        ('1,2,"0\n', {}, "is no CSV text"),
        ("1,2,3\n1,2,0\n", {"header": True, "label": "9"}, "label column 9"),
    ],
)
def test_csv_wrong_files(tmp_path, text, options, words):
    refused(csv_file(tmp_path, text), tmp_path, words, **options)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe1\x00,\x002\x00")
    refused(tmp_path / "table.csv", tmp_path, "no CSV text in UTF-8")


# npz


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    "names", [("x_train", "y_train", "x_test", "y_test"), ("train_x", "train_y", "test_x", "test_y")]
)
def test_npz_with_four_arrays(tmp_path, names):
    x, y = h.images(12)
    found = imported(
        npz(tmp_path, **dict(zip(names, (x[:, 0], y[:, None], x[:5, 0], y[:5]), strict=True))), tmp_path
    )
    assert np.array_equal(found.array("train/x"), x) and np.array_equal(found.array("train/y"), y)
    assert len(found.array("test/x")) == 5


def test_npz_with_one_set_is_cut(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4))
    y = np.arange(30) % 3.0
    found = imported(npz(tmp_path, x=x, y=y), tmp_path, test_fraction=0.5)
    assert found.array("train/x").dtype == np.float32
    assert sorted(np.concatenate([found.array("train/x"), found.array("test/x")])[:, 0]) == pytest.approx(
        sorted(x[:, 0])
    )
    assert np.bincount(found.array("test/y")).tolist() == [5, 5, 5]


def test_npz_channels_last_go_first(tmp_path):
    x, y = h.images(12, shape=(8, 9, 3))
    found = imported(npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y), tmp_path)
    assert found.shape == (3, 8, 9)
    assert np.array_equal(found.array("test/x"), x.transpose(0, 3, 1, 2))


X, Y = h.images(10)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": X}, "holds a; expected x_train"),
        ({"x": X, "y": Y[:-1]}, "10 samples but y 9 labels"),
        ({"x": X, "y": np.eye(3)[Y]}, "for one-hot rows use argmax"),
        ({"x": X, "y": Y + 0.5}, "expected whole class numbers"),
        ({"x": X, "y": Y - 1}, "label from 0"),
        ({"x": X.astype(str), "y": Y}, "expected numbers"),
        ({"x": X * np.nan, "y": Y}, "holds NaN"),
        ({"x": X[:, 0].astype(float) + 1e300, "y": Y}, "holds NaN or infinity"),
        ({"x": np.array([None] * 10), "y": Y}, "no npz of plain arrays"),
        ({"x": X[:0], "y": Y[:0]}, "0 samples cannot be cut"),
    ],
)
def test_npz_wrong_files(tmp_path, arrays, words):
    refused(npz(tmp_path, **arrays), tmp_path, words)


def test_npz_that_is_none(tmp_path):
    whole = npz(tmp_path, x=X, y=Y).read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / "a.npz").write_bytes(content)
        refused(tmp_path / "a.npz", tmp_path, "a.npz is truncated, damaged or no npz")


# choosing a format


def test_formats_and_options(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "nowhere: not found")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", tmp_path, "cannot tell the format of this file")
    refused(tmp_path, tmp_path, "cannot tell the format of this folder")
    refused(tmp_path / "a.txt", tmp_path, "unknown format 'cvs'; did you mean 'csv'", kind="cvs")
    refused(
        npz(tmp_path, x=X, y=Y),
        tmp_path,
        "option label does not apply to npz .* takes test_fraction, seed",
        label=1,
    )
    assert imported(npz(tmp_path, x=X, y=Y), tmp_path, label=None, classes=7).classes == 7
