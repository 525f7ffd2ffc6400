"""Writing: what is stored, what is refused, and that the final name only ever holds a whole file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcasync.data import write_dataset
from hpcasync.data.atomic import replacing
from hpcasync.data.write import statistics
from hpcasync.errors import UsageError

from .helpers import arrays, features


def test_the_layout_on_disk(tmp_path):
    given = arrays(source="here", class_names=("a", "b", "c"))
    path = write_dataset(tmp_path / "new" / "out.h5", given)
    with h5py.File(path, "r") as file:
        for key, array in given.by_key().items():
            assert file[key].dtype == array.dtype
            assert np.array_equal(file[key][()], array)
            assert file[key].chunks is None
            assert file[key].id.get_offset() % 4096 == 0
        attrs = dict(file.attrs)
    assert (attrs["format"], attrs["version"], attrs["name"]) == ("hpcasync-data", 1, "small")
    assert (attrs["classes"], attrs["scale"], attrs["source"]) == (3, 1 / 255, "here")
    assert list(attrs["class_names"]) == ["a", "b", "c"]
    assert attrs["checksum"].startswith("sha256:")
    assert attrs["mean"] == pytest.approx([given.train_x.mean() / 255])
    assert attrs["std"] == pytest.approx([given.train_x.std() / 255])


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    a, b = (write_dataset(tmp_path / f"{i}.h5", arrays()) for i in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_statistics_per_channel_and_per_feature():
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 5), dtype=np.uint8)
    mean, std = statistics(x, 0.5)
    assert mean == pytest.approx(x.mean(axis=(0, 2, 3)) * 0.5)
    assert std == pytest.approx(x.std(axis=(0, 2, 3)) * 0.5)
    given = features()
    mean, std = statistics(given.train_x, 1.0)
    assert mean == pytest.approx(given.train_x.mean(axis=0, dtype=np.float64))
    assert std[:-1] == pytest.approx(given.train_x.std(axis=0, dtype=np.float64)[:-1])
    assert std[-1] == 1.0  # a constant feature is not divided by zero


def bad_arrays():
    good, floats = arrays(), features()
    nan, inf = floats.train_x.copy(), floats.test_x.copy()
    nan[7, 3], inf[5, 0] = np.nan, np.inf
    return [
        (replace(good, train_y=good.train_y[:-1]), "50 samples but train/y 49 labels"),
        (replace(good, test_x=good.test_x[:0], test_y=good.test_y[:0]), "test is empty"),
        (replace(good, train_x=good.train_x.astype(np.float64)), "train/x is float64"),
        (replace(good, train_y=good.train_y.astype(np.int32)), "train/y is int32"),
        (replace(good, train_x=good.train_x[:, 0]), r"\(50, 6, 5\), expected \(N, C, H, W\)"),
        (replace(good, test_y=good.test_y[:, None]), "one class number per sample"),
        (replace(good, test_x=good.test_x[..., :-1]), "expected the same shape"),
        (replace(good, test_y=good.test_y - 1), r"test/y\[0\] is -1, expected a label from 0 to 2"),
        (replace(good, classes=2), r"train/y\[2\] is 2, expected a label from 0 to 1"),
        (replace(good, classes=0), "0 classes"),
        (replace(good, class_names=("a",)), "1 class names for 3 classes"),
        (replace(good, scale=0.0), "scale is 0.0"),
        (replace(floats, train_x=nan), r"train/x\[7\] holds NaN"),
        (replace(floats, test_x=inf), r"test/x\[5\] holds NaN or infinity"),
    ]


@pytest.mark.parametrize(("bad", "words"), bad_arrays())
def test_arrays_that_make_no_data_set(tmp_path, bad, words):
    with pytest.raises(UsageError, match=words):
        write_dataset(tmp_path / "out.h5", bad)
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = write_dataset(tmp_path / "out.h5", arrays())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write_dataset(path, features())
    assert path.read_bytes() == before
    write_dataset(path, features(), overwrite=True)
    assert path.read_bytes() != before


def test_a_folder_as_the_target(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        write_dataset(tmp_path, arrays())


def test_too_little_free_space_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(UsageError, match=r"out.h5: the disk is full \(0 MB free"):
        write_dataset(tmp_path / "out.h5", arrays())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota")])
def test_a_disk_that_fills_up_at_the_end(tmp_path, monkeypatch, code, words):
    def full(_):
        raise OSError(code, os.strerror(code))

    kept = write_dataset(tmp_path / "out.h5", arrays()).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=words):
        write_dataset(tmp_path / "out.h5", features(), overwrite=True)
    assert os.listdir(tmp_path) == ["out.h5"]
    assert (tmp_path / "out.h5").read_bytes() == kept


def test_a_write_that_fails_inside_hdf5(tmp_path, monkeypatch):
    """A real failing write, by a limit on the file size, in a process of its own."""
    script = f"""
        import sys, numpy as np
        from hpcasync.data.layout import Arrays
        from hpcasync.data.write import write_dataset
        x, y = np.ones((4000, 1, 28, 28), np.uint8), np.zeros(4000, np.int64)
        try:
            write_dataset({str(tmp_path / "out.h5")!r}, Arrays(x, y, x, y))
        except Exception as error:
            sys.exit(f"{{type(error).__name__}}: {{error}}")
    """

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("UsageError: cannot write")
    assert "file-size limit" in done.stderr
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "out.h5", arrays())
    assert os.listdir(tmp_path) == []


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="choose a folder you may write to"):
        write_dataset(tmp_path / "file" / "out.h5", arrays())


@pytest.mark.parametrize("place", [".", "/", "..", "there", "/proc/none/out.h5"])
def test_what_is_no_file_is_one_clear_error(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"cannot write {place}: "), replacing(Path(place)):
        raise AssertionError("nothing may be written")
    assert sorted(tmp_path.iterdir()) == before
