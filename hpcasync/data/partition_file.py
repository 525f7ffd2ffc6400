"""Partitions on disk: index arrays in HDF5 or npz, or one array that names the group of every sample."""

from __future__ import annotations

import heapq
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.data.partition_labels import Indices, check_parts
from hpcasync.errors import UsageError, damaged

FORMAT, VERSION = "hpcasync-partition", 1


def save_partition(
    path: str | os.PathLike[str], parts: Sequence[Indices], samples: int, *, checksum: str = "", spec: str = ""
) -> Path:
    """Write a partition to an HDF5 file: ``parts/0`` .. ``parts/<workers-1>``, int64 indices.

    Args:
        path: the file to make or replace.
        parts: index arrays, one per worker.
        samples: the number of samples of the data.
        checksum: of the data (``Dataset.header.checksum``); `load_partition` then refuses other data.
        spec: what the partition was made from, for the record.

    Raises:
        UsageError: no partition of so many samples; the file cannot be written.
    """
    path = Path(path)
    arrays = [np.asarray(p, np.int64) for p in parts]
    check_parts(f"{path}: partition", arrays, samples)
    with replacing(path, needed=8 * sum(map(len, arrays))) as temporary:
        with h5py.File(temporary, "w") as file:
            file.attrs.update({"format": np.bytes_(FORMAT), "version": VERSION, "samples": samples, "workers": len(arrays)})
            # Texts of fixed length: HDF5 1.14 can read for ever in a damaged one of variable length.
            file.attrs.update({"checksum": np.bytes_(checksum), "spec": np.bytes_(spec.encode())})
            for worker, part in enumerate(arrays):
                file.create_dataset(f"parts/{worker}", data=part)
    return path


def load_partition(
    path: str | os.PathLike[str], workers: int, samples: int, *, name: str = "train/part", checksum: str | None = None
) -> list[Indices]:
    """Read a partition for ``workers`` workers.

    The file holds index arrays, as many as workers (HDF5: in ``parts``, npz: at the top; in the order of the numbers in
    their names), or one array ``name`` or ``part`` of the group of every sample, such as its writer or hospital.
    Groups are dealt whole, the largest first, each to the worker with the fewest samples.

    Args:
        path: HDF5 or npz; a data set file with ``train/part`` will do.
        workers: the number of workers.
        samples: the number of samples of the data.
        name: of the array of groups.
        checksum: of the data; compared where the file has one.

    Raises:
        UsageError: no such file, nothing of the kind in it, another number of workers or samples, other data, fewer
            groups than workers.
    """
    path = Path(path).expanduser()
    arrays, attributes = _read(path, (name, "part"))
    theirs = attributes.get("checksum")
    if checksum and theirs and theirs != checksum:
        raise UsageError(f"{path} is a partition of other data (checksum {theirs}, these have {checksum}); make it again")
    if attributes.get("format") == FORMAT and attributes.get("samples") not in (None, samples):
        raise UsageError(f"{path} is a partition of {attributes['samples']} samples, expected {samples}; make it again")
    for key in (name, "part"):
        if key in arrays:
            return _deal(path, key, arrays[key], workers, samples)
    parts = [_indices(path, key, arrays[key]) for key in sorted(arrays, key=_numbers)]
    if len(parts) != workers:
        raise UsageError(
            f"{path} has {len(parts)} parts, expected one for each of {workers} workers; run as many, or make it again"
        )
    check_parts(str(path), parts, samples)
    return parts


def _read(path: Path, groups: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"partition file {path}: not found, expected HDF5 or npz; check the path")
    with damaged(f"partition file {path} cannot be read", "expected HDF5 or npz, see docs/data.md"):
        if zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}, {}
        with h5py.File(path, "r") as file:
            attributes = {key: _plain(file.attrs[key]) for key in ("format", "samples", "checksum") if key in file.attrs}
            for key in groups:
                if isinstance(file.get(key), h5py.Dataset):
                    return {key: file[key][:]}, attributes
            group = file.get("parts")
            arrays = {n: d[:] for n, d in group.items()} if isinstance(group, h5py.Group) else {}
    if not arrays:
        raise UsageError(
            f"{path} holds no partition: expected the index arrays parts/0, parts/1, ... or an array {groups[0]}"
        )
    return arrays, attributes


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, (str, int)) else None


def _indices(path: Path, name: str, array: np.ndarray) -> Indices:
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise UsageError(f"{path}: {name} is {array.dtype} {array.shape}, expected whole numbers (n,), indices of samples")
    return array.astype(np.int64)


def _deal(path: Path, name: str, groups: np.ndarray, workers: int, samples: int) -> list[Indices]:
    if groups.shape != (samples,):
        raise UsageError(f"{path}: {name} has shape {groups.shape}, expected ({samples},): the group of every sample")
    values, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(values) < workers:
        raise UsageError(
            f"{path}: {name} has {len(values)} groups for {workers} workers, which leaves one empty; use fewer workers"
        )
    load = [(0, worker) for worker in range(workers)]
    owner = np.empty(len(values), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        count, worker = load[0]
        owner[group] = worker
        heapq.heapreplace(load, (count + int(sizes[group]), worker))
    return [np.flatnonzero(owner[inverse] == worker) for worker in range(workers)]


def _numbers(name: str) -> tuple[list[int], str]:
    return [int(n) for n in re.findall(r"\d+", name)], name
