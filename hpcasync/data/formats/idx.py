"""Read the IDX files of the MNIST family, compressed or not.

Format: http://yann.lecun.com/exdb/mnist/ - big-endian: magic (0x0803 for images, 0x0801 for labels), the
dimensions as 32-bit numbers, then bytes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.data.layout import Arrays
from hpcasync.errors import UsageError

_PARTS = {"train": "train", "test": "t10k"}
_MAGIC = {"images-idx3": 0x0803, "labels-idx1": 0x0801}


def matches(src: Path) -> bool:
    """Whether ``src`` is a folder with training images in IDX format."""
    return src.is_dir() and _find(src, "train", "images-idx3") is not None


def read(src: Path) -> Arrays:
    """Read the four files in the folder ``src``: images ``(N, 1, H, W)`` uint8, labels int64.

    Raises:
        UsageError: a missing or truncated file, a wrong magic number, or counts that disagree.
    """
    if not src.is_dir():
        raise UsageError(f"{src} is a file, expected the folder that holds the four IDX files")
    found: dict[str, NDArray[Any]] = {}
    for split, prefix in _PARTS.items():
        images_path, images = _load(src, prefix, "images-idx3")
        labels_path, labels = _load(src, prefix, "labels-idx1")
        if len(images) != len(labels):
            raise UsageError(
                f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} labels, "
                "expected as many; the two files do not belong together"
            )
        found[f"{split}_x"] = images[:, None]
        found[f"{split}_y"] = labels.astype(np.int64)
    return Arrays(found["train_x"], found["train_y"], found["test_x"], found["test_y"], name=src.name)


def _find(src: Path, prefix: str, part: str) -> Path | None:
    stem = f"{prefix}-{part}-ubyte"
    for name in (stem, stem.replace("-idx", ".idx")):
        for path in (src / name, src / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _load(src: Path, prefix: str, part: str) -> tuple[Path, NDArray[np.uint8]]:
    path = _find(src, prefix, part)
    if path is None:
        raise UsageError(
            f"{src} lacks {prefix}-{part}-ubyte(.gz), expected train- and t10k- files with images and "
            "labels; download the missing file"
        )
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise UsageError(f"{path} is truncated or damaged ({error}); download it again") from error
    magic = int.from_bytes(content[:4], "big")
    if len(content) < 4 or magic != _MAGIC[part]:
        raise UsageError(
            f"{path} starts with magic number 0x{magic:08x}, expected 0x{_MAGIC[part]:08x} "
            f"({part} bytes); it is another file"
        )
    dimensions = magic & 0xFF
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if len(content) != start + math.prod(shape):
        what = "truncated" if len(content) < start + math.prod(shape) else "too long"
        raise UsageError(
            f"{path} is {what}: {len(content)} bytes, expected {start + math.prod(shape)} for the shape "
            f"{shape} in its header; download it again"
        )
    return path, np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
