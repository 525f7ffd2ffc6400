"""Read and validate the header of a data set file: everything but the samples."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcasync.data.layout import FORMAT, KEYS, VERSION, check_shapes
from hpcasync.errors import UsageError, damaged

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ATTRIBUTES = ("name", "classes", "scale", "mean", "std", "source", "checksum")


@dataclass(frozen=True)
class Place:
    """Where one array lies in the file: type, shape, and offset in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a data set file says about itself."""

    name: str
    classes: int
    class_names: tuple[str, ...]
    scale: float
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    source: str
    checksum: str
    places: dict[str, Place]
    stamp: tuple[int, int]  # size and modification time: has the file been replaced since?


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of ``path``."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def read_header(path: Path) -> Header:
    """Read the header of ``path`` without keeping the file open.

    Raises:
        UsageError: not found, not HDF5, truncated, another format or a newer version, something missing, or
            shapes that disagree.
    """
    _check_file(path)
    try:
        with damaged(f"{path} cannot be read as HDF5", "import or copy it again"), _open(path) as file:
            return _read(path, file)
    except UsageError as error:
        if "truncated" not in str(error.__cause__):
            raise
        raise UsageError(f"{path} is truncated: an import or copy was cut short; import or copy it again") from error


def _open(path: Path) -> Any:
    # Readers take no lock: many sites mount their file systems without locks. But where this process has the
    # file open already, HDF5 insists on the same choice again.
    *choices, last = False, None, "best-effort", True
    for locking in choices:
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:
            if "flag values don't match" not in str(error):
                raise
    return h5py.File(path, "r", locking=last)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UsageError(
            f"{path}: not found, expected a data set file; check the path, or make it with "
            "'hpcasync data import'"
        )
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder, expected an HDF5 file; import it with 'hpcasync data import {path} "
            "--out FILE'"
        )
    try:
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if start != _SIGNATURE:
        what = "is empty" if not start else f"is not an HDF5 file (it starts with {start!r})"
        raise UsageError(
            f"{path} {what}, expected a data set file; import it with 'hpcasync data import {path} "
            "--out FILE'"
        )


def _read(path: Path, file: Any) -> Header:
    attrs = dict(file.attrs)
    if _text(attrs.get("format")) != FORMAT:
        raise UsageError(
            f"{path} is HDF5 but its attribute format is {_text(attrs.get('format'))!r}, expected "
            f"{FORMAT!r}; see docs/data.md for the layout, or import the data"
        )
    version = _number(path, attrs, "version")
    if version != VERSION:
        newer = "update hpcasync" if version > VERSION else "import the data again"
        raise UsageError(f"{path} has layout version {version:g}, expected {VERSION}; {newer}")
    missing = [key for key in _ATTRIBUTES if key not in attrs]
    missing += [key for key in KEYS if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        raise UsageError(
            f"{path} lacks {', '.join(missing)}; see docs/data.md for the layout, or import the data again"
        )
    arrays = {key: file[key] for key in KEYS}
    check_shapes(path, arrays)
    places = {key: _place(path, key, array) for key, array in arrays.items()}
    classes = _number(path, attrs, "classes")
    if classes < 1 or classes != int(classes):
        raise UsageError(f"{path}: attribute classes is {classes:g}, expected a whole number from 1")
    scale = _number(path, attrs, "scale")
    mean, std = (_vector(path, attrs, key, places["train/x"].shape[1]) for key in ("mean", "std"))
    if not (std > 0).all() or not scale > 0:
        raise UsageError(f"{path}: attributes std and scale must be positive; import the data again")
    names = tuple(_text(n) or "" for n in attrs.get("class_names", ()))
    return Header(
        _text(attrs["name"]) or "",
        int(classes),
        names,
        scale,
        mean,
        std,
        _text(attrs["source"]) or "",
        _text(attrs["checksum"]) or "",
        places,
        stamp(path),
    )


def _place(path: Path, key: str, array: Any) -> Place:
    offset = array.id.get_offset()
    if offset is None:
        raise UsageError(
            f"{path}: {key} is stored in chunks or compressed, expected one contiguous block (it is "
            "mapped into memory); write it without chunks= and compression="
        )
    return Place(array.dtype, array.shape, int(offset))


def _text(value: Any) -> str | None:
    return (
        value.decode("utf-8", "replace")
        if isinstance(value, bytes)
        else None
        if value is None
        else str(value)
    )


def _number(path: Path, attrs: dict[str, Any], key: str) -> float:
    try:
        number = float(attrs[key])
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: attribute {key} is {attrs.get(key)!r}, expected a number") from None
    if not np.isfinite(number):
        raise UsageError(f"{path}: attribute {key} is {number}, expected a finite number")
    return number


def _vector(path: Path, attrs: dict[str, Any], key: str, length: int) -> NDArray[np.float64]:
    try:
        vector = np.asarray(attrs[key], dtype=np.float64)
    except (TypeError, ValueError):
        vector = np.empty(0)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise UsageError(
            f"{path}: attribute {key} has shape {vector.shape}, expected {length} finite numbers (one per "
            "channel or feature)"
        )
    return vector
