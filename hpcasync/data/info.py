"""What a data set holds, as plain values: the answer of ``hpcasync data info``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hpcasync.data.dataset import Dataset, open_dataset
from hpcasync.data.layout import SPLITS


def info(source: str | os.PathLike[str] | Dataset, *, verify: bool = True) -> dict[str, Any]:
    """Describe a data set with values that JSON can hold.

    Args:
        source: a name, a path, or an open data set.
        verify: compare the checksum too (reads the whole file).

    Returns:
        ``name``, ``path``, ``shape`` of a sample, ``classes``, ``class_names``, ``splits`` (per split
        ``samples``, ``shape``, ``dtype``, ``class_counts``), ``normalisation`` (``scale``, ``mean``,
        ``std``), ``checksum``, ``verified``, ``source``, ``bytes``.

    Raises:
        UsageError: whatever is wrong with the file; with ``verify``, a checksum that does not hold.
    """
    dataset = open_dataset(source)
    header = dataset.header
    if verify:
        dataset.verify()
    splits = {}
    for split in SPLITS:
        x, y = dataset.array(f"{split}/x"), dataset.array(f"{split}/y")
        counts = np.bincount(y, minlength=dataset.classes)
        splits[split] = {
            "samples": len(y),
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "class_counts": counts.tolist(),
        }
    return {
        "name": dataset.name,
        "path": str(dataset.path),
        "shape": list(dataset.shape),
        "classes": dataset.classes,
        "class_names": list(header.class_names),
        "splits": splits,
        "normalisation": {"scale": header.scale, "mean": header.mean.tolist(), "std": header.std.tolist()},
        "checksum": header.checksum,
        "verified": verify,
        "source": header.source,
        "bytes": header.stamp[0],
    }
