"""Write arrays as a data set file: checks, normalisation statistics, contiguous arrays, one atomic rename."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcasync.data.atomic import replacing
from hpcasync.data.layout import FORMAT, VERSION, Arrays, blocks, check_shapes, check_values, checksum
from hpcasync.errors import UsageError

_PAGE = 4096  # arrays start on a page, so that mapped labels are aligned


def write_dataset(
    out: str | os.PathLike[str], arrays: Arrays, *, overwrite: bool = False, where: object = ""
) -> Path:
    """Write ``arrays`` to the HDF5 file ``out`` and return its path.

    The same arrays always give the same bytes. Several processes may write the same file at once.

    Args:
        out: the file to make.
        arrays: the data set.
        overwrite: replace a file that is already there.
        where: what error messages about the arrays name; the default is ``out``.

    Raises:
        UsageError: arrays that do not make a data set, ``out`` exists, the disk is full, or no permission.
    """
    path = Path(out)
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder, expected the name of the file to write, such as {path / 'data.h5'}"
        )
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name, or ask for it to be overwritten")
    by_key = arrays.by_key()
    where = where or path
    check_shapes(where, by_key)
    classes = _classes(where, arrays)
    check_values(where, by_key, classes)
    scale = (
        arrays.scale if arrays.scale is not None else (1 / 255 if arrays.train_x.dtype == np.uint8 else 1.0)
    )
    if not (np.isfinite(scale) and scale > 0):
        raise UsageError(f"{where}: scale is {scale}, expected a positive number")
    mean, std = statistics(arrays.train_x, scale)
    with replacing(path, needed=sum(a.nbytes + _PAGE for a in by_key.values())) as temp:
        with h5py.File(temp, "w", alignment_threshold=1, alignment_interval=_PAGE) as file:
            for key, array in by_key.items():
                file.create_dataset(key, data=np.ascontiguousarray(array))
            file.attrs["format"] = FORMAT
            file.attrs["version"] = VERSION
            file.attrs["name"] = arrays.name or path.stem
            file.attrs["classes"] = classes
            file.attrs["scale"] = scale
            file.attrs["mean"] = mean
            file.attrs["std"] = std
            file.attrs["source"] = arrays.source
            file.attrs["checksum"] = checksum(by_key)
            if arrays.class_names:
                file.attrs["class_names"] = list(arrays.class_names)
    return path


def statistics(x: NDArray[Any], scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of ``x * scale`` per channel ``(N, C, H, W)`` or feature ``(N, F)``, in
    float64.

    A channel or feature that never changes gets the standard deviation 1: it becomes 0, not a division by
    zero.
    """
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    count = x.size // x.shape[1]
    total = np.zeros(x.shape[1])
    for block in blocks(x):
        total += block.sum(axis=axes, dtype=np.float64)
    mean = total / count
    spread = np.zeros(x.shape[1])
    centre = mean.reshape(-1, 1, 1) if x.ndim == 4 else mean
    for block in blocks(x):
        spread += np.square(block - centre).sum(axis=axes)
    std = np.sqrt(spread / count) * scale
    mean *= scale
    std[std <= 1e-7 * np.maximum(1e-30, np.abs(mean))] = 1.0
    return mean, std


def _classes(where: object, arrays: Arrays) -> int:
    if arrays.classes is None:
        found = 1 + max(int(arrays.train_y.max()), int(arrays.test_y.max()))
    else:
        found = arrays.classes
    if found < 1:
        raise UsageError(f"{where}: {found} classes, expected at least one; labels count from 0")
    if arrays.class_names and len(arrays.class_names) != found:
        raise UsageError(
            f"{where}: {len(arrays.class_names)} class names for {found} classes, expected as many"
        )
    return found
