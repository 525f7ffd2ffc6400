"""Data sets: one HDF5 layout, import of public formats, shards per rank, and the loader.

A data set is one HDF5 file with four contiguous arrays, so that every rank can map it and a node keeps one
copy in its page cache::

    train/x   test/x    uint8 or float32, (N, C, H, W) for images or (N, F) for features
    train/y   test/y    int64, (N,), labels 0 .. classes-1

and the root attributes ``format`` (``"hpcasync-data"``), ``version`` (1), ``name``, ``classes``, ``scale``
(stored values are multiplied by it), ``mean`` and ``std`` (per channel or feature, after scaling, of the
training split), ``source``, ``checksum`` (SHA-256 over the arrays) and, where the classes have names,
``class_names``. Bytes stay bytes on disk; what the loader yields is ``(x * scale - mean) / std`` in float32.
Nothing here needs MPI.
"""

from __future__ import annotations

from hpcasync.data.dataset import Dataset, Split, open_dataset
from hpcasync.data.fetch import fetch
from hpcasync.data.importer import import_dataset
from hpcasync.data.info import info
from hpcasync.data.layout import Arrays
from hpcasync.data.loader import Loader, loader
from hpcasync.data.partition import shard
from hpcasync.data.partition_file import load_partition, save_partition
from hpcasync.data.partition_labels import make_partition
from hpcasync.data.public import known
from hpcasync.data.resolve import resolve
from hpcasync.data.sampler import ShardSampler
from hpcasync.data.verification import verification_batch
from hpcasync.data.write import write_dataset

__all__ = [
    "Arrays",
    "Dataset",
    "Loader",
    "ShardSampler",
    "Split",
    "fetch",
    "import_dataset",
    "info",
    "known",
    "load_partition",
    "loader",
    "make_partition",
    "open_dataset",
    "resolve",
    "save_partition",
    "shard",
    "verification_batch",
    "write_dataset",
]
