"""The readers of public formats: one module each, with ``read(src, ...)`` and ``matches(src)``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from hpcasync.data.formats import cifar, csv, idx, npz
from hpcasync.errors import UsageError

KINDS: dict[str, ModuleType] = {"idx": idx, "cifar": cifar, "csv": csv, "npz": npz}


def detect(src: Path) -> str:
    """The format of ``src`` by its file names.

    Raises:
        UsageError: none fits.
    """
    for kind, module in KINDS.items():
        if module.matches(src):
            return kind
    what = "folder" if src.is_dir() else "file"
    raise UsageError(
        f"{src}: cannot tell the format of this {what}, expected a folder with IDX files or CIFAR "
        f"batches, a CIFAR .tar.gz, a .csv or a .npz file; name it with kind = {', '.join(KINDS)}"
    )
