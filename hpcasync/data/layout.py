"""The HDF5 layout: its constants, the arrays to be written, and the rules that they must obey."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.errors import UsageError

FORMAT = "hpcasync-data"
VERSION = 1
SPLITS = ("train", "test")
KEYS = ("train/x", "train/y", "test/x", "test/y")
_BLOCK = 1 << 24  # bytes looked at in one go, so that checks of a mapped file need little memory


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, before it is written.

    Attributes:
        train_x, test_x: uint8 or float32, ``(N, C, H, W)`` or ``(N, F)``.
        train_y, test_y: int64, ``(N,)``, labels from 0.
        name: a short name.
        classes: the number of classes; None takes the largest label plus one.
        scale: the factor on the stored values; None is 1/255 for uint8 and 1 for float32.
        source: where the data came from, with its licence if known.
        class_names: one name per class, or empty.
    """

    train_x: NDArray[Any]
    train_y: NDArray[Any]
    test_x: NDArray[Any]
    test_y: NDArray[Any]
    name: str = ""
    classes: int | None = None
    scale: float | None = None
    source: str = ""
    class_names: tuple[str, ...] = ()

    def by_key(self) -> dict[str, NDArray[Any]]:
        """The four arrays under the names they have in the file."""
        return {
            "train/x": self.train_x,
            "train/y": self.train_y,
            "test/x": self.test_x,
            "test/y": self.test_y,
        }


def blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Consecutive row blocks of ``array`` of about 16 MB."""
    rows = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """``"sha256:..."`` over name, type, shape and little-endian bytes of the four arrays."""
    digest = hashlib.sha256()
    for key in KEYS:
        array = arrays[key]
        digest.update(f"{key} {array.dtype.newbyteorder('<').str} {array.shape}\n".encode())
        for block in blocks(array):
            digest.update(np.ascontiguousarray(block, dtype=array.dtype.newbyteorder("<")).data)
    return f"sha256:{digest.hexdigest()}"


def check_shapes(where: object, arrays: Mapping[str, Any]) -> None:
    """Refuse arrays whose types and shapes do not make a data set.

    Args:
        where: the file or source, for the message.
        arrays: anything with ``shape`` and ``dtype``, under the four keys.

    Raises:
        UsageError: a wrong type or number of dimensions, an empty array, or lengths or sample shapes that
            disagree.
    """
    for split in SPLITS:
        x, y = arrays[f"{split}/x"], arrays[f"{split}/y"]
        if x.dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise UsageError(f"{where}: {split}/x is {x.dtype}, expected uint8 or float32; convert it first")
        if y.dtype != np.dtype(np.int64):
            raise UsageError(
                f"{where}: {split}/y is {y.dtype}, expected int64 class numbers; convert it first"
            )
        if len(x.shape) not in (2, 4):
            raise UsageError(
                f"{where}: {split}/x has shape {x.shape}, expected (N, C, H, W) or (N, F); reshape it"
            )
        if len(y.shape) != 1:
            raise UsageError(
                f"{where}: {split}/y has shape {y.shape}, expected (N,): one class number per sample"
            )
        if 0 in x.shape or 0 in y.shape:
            raise UsageError(
                f"{where}: {split} is empty (x {x.shape}, y {y.shape}), expected at least one sample"
            )
        if x.shape[0] != y.shape[0]:
            raise UsageError(
                f"{where}: {split}/x holds {x.shape[0]} samples but {split}/y {y.shape[0]} labels, "
                "expected as many; the two files or arrays do not belong together"
            )
    train, test = arrays["train/x"], arrays["test/x"]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise UsageError(
            f"{where}: training samples are {train.dtype} {train.shape[1:]} but test samples "
            f"{test.dtype} {test.shape[1:]}, expected the same shape and type"
        )


def check_values(where: object, arrays: Mapping[str, NDArray[Any]], classes: int) -> None:
    """Refuse labels outside ``0 .. classes-1`` and samples that are not finite.

    Raises:
        UsageError: naming the array, the first bad position and the value.
    """
    for split in SPLITS:
        y = arrays[f"{split}/y"]
        bad = (y < 0) | (y >= classes)
        if bad.any():
            at = int(bad.argmax())
            raise UsageError(
                f"{where}: {split}/y[{at}] is {int(y[at])}, expected a label from 0 to {classes - 1} "
                f"({classes} classes); correct the labels or the number of classes"
            )
        x = arrays[f"{split}/x"]
        if x.dtype == np.float32:
            start = 0
            for block in blocks(x):
                finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
                if not finite.all():
                    at = start + int(finite.argmin())
                    raise UsageError(
                        f"{where}: {split}/x[{at}] holds NaN or infinity, expected finite numbers; "
                        "remove or fill these samples and import again"
                    )
                start += len(block)
