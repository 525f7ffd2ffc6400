"""Read the CIFAR-10 and CIFAR-100 Python batches, from the unpacked folder or from the archive itself.

Format: https://www.cs.toronto.edu/~kriz/cifar.html - pickled dictionaries with ``data`` (N, 3072) uint8,
channel first, and ``labels`` (CIFAR-10) or ``fine_labels`` (CIFAR-100).
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.data.formats.safe_pickle import loads
from hpcasync.data.layout import Arrays
from hpcasync.errors import UsageError

_SETS: dict[str, tuple[dict[str, tuple[str, ...]], str, str, int]] = {
    # parts, key of the labels, file of the class names, classes
    "cifar-10": (
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "labels",
        "batches.meta",
        10,
    ),
    "cifar-100": ({"train": ("train",), "test": ("test",)}, "fine_labels", "meta", 100),
}
_FILES = {f for parts, _, meta, _ in _SETS.values() for f in (*parts["train"], *parts["test"], meta)}


def matches(src: Path) -> bool:
    """Whether ``src`` is a folder with CIFAR batches or a tar archive."""
    if src.is_dir():
        return (src / "data_batch_1").is_file() or ((src / "train").is_file() and (src / "test").is_file())
    return src.name.endswith((".tar.gz", ".tgz", ".tar"))


def read(src: Path) -> Arrays:
    """Read all batches: images ``(N, 3, 32, 32)`` uint8, labels int64.

    Raises:
        UsageError: a missing, damaged or dangerous file, or counts that disagree.
    """
    files = _folder(src) if src.is_dir() else _archive(src)
    name = "cifar-100" if "train" in files else "cifar-10"
    parts, label_key, meta, classes = _SETS[name]
    found: dict[str, NDArray[Any]] = {}
    for split, batches in parts.items():
        missing = [batch for batch in batches if batch not in files]
        if missing:
            raise UsageError(
                f"{src} lacks {', '.join(missing)}, expected all {name} batches; download it again"
            )
        pairs = [_batch(files[batch], f"{src}/{batch}", label_key) for batch in batches]
        found[f"{split}_x"] = np.concatenate([x for x, _ in pairs])
        found[f"{split}_y"] = np.concatenate([y for _, y in pairs])
    names = _names(files[meta], f"{src}/{meta}", label_key, classes) if meta in files else ()
    x, y, test_x, test_y = (found[key] for key in ("train_x", "train_y", "test_x", "test_y"))
    return Arrays(x, y, test_x, test_y, name=name, classes=classes, class_names=names)


def _folder(src: Path) -> dict[str, bytes]:
    return {name: (src / name).read_bytes() for name in _FILES if (src / name).is_file()}


def _archive(src: Path) -> dict[str, bytes]:
    """Read the wanted members into memory: nothing is unpacked to disk, so no path in the archive matters."""
    try:
        with tarfile.open(src) as tar:
            files = {}
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if name in _FILES and member.isreg() else None
                if content is not None:
                    files[name] = content.read()
            return files
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(
            f"{src} is truncated, damaged or no tar archive ({error}); download it again"
        ) from error


def _batch(content: bytes, where: str, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    table = _table(content, where)
    if "data" not in table or label_key not in table:
        raise UsageError(
            f"{where} holds {', '.join(sorted(table)) or 'nothing'}, expected data and {label_key}; it is "
            "no CIFAR batch"
        )
    x = np.asarray(table["data"])
    try:
        y = np.asarray(table[label_key], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {label_key} are no class numbers ({error}); download it again") from error
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072:
        raise UsageError(f"{where}: data is {x.dtype} {x.shape}, expected uint8 (N, 3072); download it again")
    if y.shape != x.shape[:1]:
        raise UsageError(
            f"{where} holds {len(x)} images and labels of shape {y.shape}, expected as many; download it "
            "again"
        )
    return x.reshape(-1, 3, 32, 32), y


def _names(content: bytes, where: str, label_key: str, classes: int) -> tuple[str, ...]:
    names = _table(content, where).get(label_key.replace("labels", "label") + "_names", [])
    texts = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names)
    return texts if len(texts) == classes else ()


def _table(content: bytes, where: str) -> Mapping[str, Any]:
    table = loads(content, where)
    if not isinstance(table, dict):
        raise UsageError(
            f"{where} holds a {type(table).__name__}, expected a dictionary; it is no CIFAR batch"
        )
    return {k.decode("utf-8", "replace") if isinstance(k, bytes) else str(k): v for k, v in table.items()}
