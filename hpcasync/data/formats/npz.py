"""Read a NumPy ``.npz`` file with training and test arrays, or with one set to be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.data.formats.split import stratified
from hpcasync.data.layout import Arrays
from hpcasync.errors import UsageError, damaged

_FOUR = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_x", "train_y", "test_x", "test_y"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)


def matches(src: Path) -> bool:
    """Whether ``src`` is named like an npz file."""
    return src.is_file() and src.suffix.lower() == ".npz"


def read(src: Path, *, test_fraction: float = 0.2, seed: int = 0) -> Arrays:
    """Read ``src``; samples become uint8 or float32, ``(N, H, W)`` gets a channel, channels last go first.

    Args:
        src: the file, with ``x_train, y_train, x_test, y_test``, the same as ``train_x, ...`` or
            ``train_images, train_labels, ...``, or only ``x`` and ``y``.
        test_fraction: with ``x`` and ``y``, the part that becomes the test split.
        seed: of that cut.

    Raises:
        UsageError: a damaged file, missing arrays, Python objects inside, or labels that are no whole
            numbers.
    """
    wrong = f"{src} is truncated, damaged or no npz of plain arrays"
    with damaged(wrong, "save it again with numpy.savez"):
        with src.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            names = list(file.files)
            four = next((keys for keys in _FOUR if set(keys) <= set(names)), None)
            wanted = four or ("x", "y")
            if not set(wanted) <= set(names):
                raise UsageError(
                    f"{src} holds {', '.join(names) or 'no arrays'}; expected x_train, y_train, x_test, "
                    "y_test (or train_x, ...), or x and y; rename the arrays"
                )
            arrays = [file[key] for key in wanted]
    x = [_samples(f"{src}: {key}", a) for key, a in zip(wanted[::2], arrays[::2], strict=True)]
    y = [_labels(f"{src}: {key}", a) for key, a in zip(wanted[1::2], arrays[1::2], strict=True)]
    if four:
        return Arrays(x[0], y[0], x[1], y[1], name=src.stem)
    if len(x[0]) != len(y[0]):
        raise UsageError(f"{src}: x holds {len(x[0])} samples but y {len(y[0])} labels, expected as many")
    train, test = stratified(src, y[0], test_fraction, seed)
    return Arrays(
        x[0][train], y[0][train], x[0][test], y[0][test], name=src.stem, classes=int(y[0].max()) + 1
    )


def _samples(what: str, x: NDArray[Any]) -> NDArray[Any]:
    if x.dtype.kind not in "uifb":
        raise UsageError(f"{what} is {x.dtype}, expected numbers")
    if x.dtype != np.uint8:
        # What overflows becomes infinity and is refused later, with its position.
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    if x.ndim == 3:
        return x[:, None]
    # Channels last, as Keras and TensorFlow save them: only the last axis can be a number of channels.
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.ascontiguousarray(np.moveaxis(x, 3, 1))
    return x


def _labels(what: str, y: NDArray[Any]) -> NDArray[np.int64]:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "uifb" or y.ndim != 1 or not np.array_equal(y, np.floor(y.astype(np.float64))):
        raise UsageError(
            f"{what} is {y.dtype} of shape {y.shape}, expected whole class numbers (N,); "
            "for one-hot rows use argmax first"
        )
    return y.astype(np.int64)
