"""An open data set: a path and a header; each process maps the arrays when it first touches them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from hpcasync.data.header import Header, read_header, stamp
from hpcasync.data.layout import KEYS, SPLITS, check_values, checksum
from hpcasync.data.resolve import resolve
from hpcasync.errors import UsageError, unknown


class Dataset:
    """A data set file, validated; cheap to pickle and safe to fork.

    No file handle stays open: HDF5 tells where the contiguous arrays lie, and they are mapped read-only. All
    ranks of a node share the mapped pages; a fork inherits them; a pickle carries the path and maps again.

    Args:
        path: the HDF5 file.
        verify: also compare the checksum (reads the whole file).

    Raises:
        UsageError: the file is not a valid data set; labels out of range; NaN or infinity in float samples.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = Path(path).absolute()
        self._header = read_header(self.path)
        self._maps: dict[str, NDArray[Any]] = {}
        check_values(self.path, {key: self.array(key) for key in KEYS}, self.classes)
        if verify:
            self.verify()

    @property
    def header(self) -> Header:
        """Everything the file says about itself."""
        return self._header

    @property
    def name(self) -> str:
        """The name stored in the file."""
        return self._header.name

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self._header.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: ``(C, H, W)`` or ``(F,)``."""
        return self._header.places["train/x"].shape[1:]

    def array(self, key: str) -> NDArray[Any]:
        """The stored array ``key`` (``"train/x"`` and so on) as a read-only map, not normalised."""
        if key not in self._maps:
            if key not in KEYS:
                raise unknown("array", key, KEYS)
            self._refresh()
            place = self._header.places[key]
            mapped = np.memmap(self.path, dtype=place.dtype, mode="r", offset=place.offset, shape=place.shape)
            # A plain view: indexing a memmap object costs several times more.
            self._maps[key] = mapped.view(np.ndarray)
        return self._maps[key]

    def as_torch(self, split: str = "train") -> Split:
        """A map-style torch data set of one split, for any ``DataLoader``."""
        return Split(self, split)

    def verify(self) -> None:
        """Compare the arrays with the stored checksum.

        Raises:
            UsageError: they differ.
        """
        found = checksum({key: self.array(key) for key in KEYS})
        if found != self._header.checksum:
            raise UsageError(
                f"{self.path} is damaged: its arrays have the checksum {found}, expected "
                f"{self._header.checksum}; import or copy it again"
            )

    def _refresh(self) -> None:
        """Read the header again when the file was replaced; it must hold the same data."""
        if not self.path.exists() or stamp(self.path) != self._header.stamp:
            fresh = read_header(self.path)
            if fresh.checksum != self._header.checksum:
                raise UsageError(f"{self.path} was replaced by other data while in use; start again")
            self._header = fresh

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_header": self._header, "_maps": {}}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.array(f'{s}/y'))} {s}" for s in SPLITS)
        return f"Dataset({self.name!r}, {counts}, shape {self.shape}, {self.classes} classes, {self.path})"


class Split(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One split as a torch data set: ``split[i]`` is ``(x float32 normalised, y int64)``.

    Args:
        dataset: the open file.
        split: ``"train"`` or ``"test"``.

    Raises:
        UsageError: an unknown split.
    """

    def __init__(self, dataset: Dataset, split: str = "train") -> None:
        if split not in SPLITS:
            raise unknown("split", str(split), SPLITS)
        self.dataset = dataset
        self.split = split
        header = dataset.header
        shape = (-1, 1, 1) if len(dataset.shape) == 3 else (-1,)
        # (x * scale - mean) / std as one multiplication and one addition
        self._factor = torch.from_numpy(header.scale / header.std).float().reshape(shape)
        self._offset = torch.from_numpy(-header.mean / header.std).float().reshape(shape)

    def __len__(self) -> int:
        return self.dataset.header.places[f"{self.split}/y"].shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.split}")
        x, y = self.batch(np.asarray([index]))
        return x[0], y[0]

    def batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples ``indices`` as ``(x float32 (B, ...), y int64 (B,))``, normalised."""
        x = torch.from_numpy(self.dataset.array(f"{self.split}/x")[indices])
        y = torch.from_numpy(self.dataset.array(f"{self.split}/y")[indices])
        return torch.mul(x, self._factor).add_(self._offset), y

    def flat(self) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """For compiled loops: stored samples (N, F), labels (N,), and the factor and offset (F,) that normalise a sample."""
        x, y = (self.dataset.array(f"{self.split}/{k}") for k in "xy")
        factor, offset = (t.expand(self.dataset.shape).reshape(-1).numpy() for t in (self._factor, self._offset))
        return x.reshape(len(x), -1), y, factor, offset


def open_dataset(source: str | os.PathLike[str] | Dataset, *, cache: str | os.PathLike[str] | None = None) -> Dataset:
    """Open a name, a path or an open data set (returned as it is).

    Args:
        source: ``"digits"``, ``"mnist"``, ..., the path of an imported HDF5 file, or a `Dataset`.
        cache: the folder of imported public sets (see `resolve`).

    Raises:
        UsageError: an unknown name, data that are not here, or an invalid file.
    """
    return source if isinstance(source, Dataset) else Dataset(resolve(source, cache=cache))
