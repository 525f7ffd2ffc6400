"""Small data sets in every format, made on the spot."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from hpcasync.data import Arrays

CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def world(rank, size):
    return SimpleNamespace(rank=rank, size=size)


def images(n, *, seed=0, shape=(1, 6, 5), classes=3):
    """uint8 images and labels in which every class occurs."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.int64) % classes


def arrays(n=50, n_test=20, **changes):
    x, y = images(n)
    test_x, test_y = images(n_test, seed=1)
    return Arrays(
        **{"train_x": x, "train_y": y, "test_x": test_x, "test_y": test_y, "name": "small", **changes}
    )


def features(n=50, n_test=20):
    """A float data set of seven features, the last of which never changes."""
    rng = np.random.default_rng(2)
    x = rng.normal(3, 5, (n + n_test, 7)).astype(np.float32)
    x[:, -1] = 4
    y = np.arange(n + n_test, dtype=np.int64) % 3
    return Arrays(x[:n], y[:n], x[n:], y[n:], name="features")


def edit(path: Path, **attributes):
    """Change root attributes of a data set file; None removes one."""
    with h5py.File(path, "r+") as file:
        for key, value in attributes.items():
            del file.attrs[key]
            if value is not None:
                file.attrs[key] = value


def swap(path: Path, key: str, value, **options):
    """Replace one array of a data set file; None removes it."""
    with h5py.File(path, "r+") as file:
        del file[key]
        if value is not None:
            file.create_dataset(key, data=value, **options)


def idx_bytes(array: np.ndarray) -> bytes:
    magic = {3: 0x0803, 1: 0x0801}[array.ndim]
    head = b"".join(int(d).to_bytes(4, "big") for d in (magic, *array.shape))
    return head + array.astype(np.uint8).tobytes()


def idx_folder(folder: Path, *, compress=True, n=30, n_test=10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count, seed in (("train", n, 0), ("t10k", n_test, 1)):
        x, y = images(count, seed=seed)
        for part, content in (("images-idx3", idx_bytes(x[:, 0])), ("labels-idx1", idx_bytes(y))):
            name = f"{prefix}-{part}-ubyte" + (".gz" if compress else "")
            # mtime=0: the same bytes every time, so that a test can know their checksum
            (folder / name).write_bytes(gzip.compress(content, mtime=0) if compress else content)
    return folder


def py2_pickle(data: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """The bytes that Python 2 wrote for {'data': ..., 'labels': [...]}: the files of CIFAR were made so."""

    def text(s: bytes) -> bytes:  # Python 2 wrote its byte strings as SHORT_BINSTRING or BINSTRING
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + len(s).to_bytes(4, "little") + s

    def number(i: int) -> bytes:
        return b"K" + bytes([i]) if i < 256 else b"M" + i.to_bytes(2, "little")

    shape = number(data.shape[0]) + number(data.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + number(0)
        + b"\x85"
        + text(b"b")
        + b"\x87R"
    )
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    items = text(b"data") + array + text(key) + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def cifar10_files(*, py2=True, n=4) -> dict[str, bytes]:
    files = {}
    for i, name in enumerate(CIFAR10):
        x, y = images(n, seed=i, shape=(3072,), classes=10)
        if py2:
            files[name] = py2_pickle(x, y.tolist())
        else:
            files[name] = pickle.dumps({"data": x, "labels": y.tolist()}, protocol=i % 6)
    files["batches.meta"] = pickle.dumps(
        {b"label_names": [f"kind {i}".encode() for i in range(10)]}, protocol=2
    )
    return files


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def archive_of(path: Path, files: dict[str, bytes], prefix="cifar-10-batches-py/") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
