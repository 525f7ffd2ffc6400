"""Import public formats into the one HDF5 layout."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcasync.data.formats import KINDS, detect
from hpcasync.data.write import write_dataset
from hpcasync.errors import UsageError, unknown


def import_dataset(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = "auto",
    name: str | None = None,
    classes: int | None = None,
    source: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Read ``src``, check it, and write the data set file ``out``; return its path.

    Args:
        src: a folder of IDX files (MNIST family), a folder or ``.tar.gz`` of CIFAR-10/100 Python batches, a
            ``.csv`` file, or a ``.npz`` file.
        out: the HDF5 file to make; it appears only when it is whole.
        kind: ``"idx"``, ``"cifar"``, ``"csv"``, ``"npz"``, or ``"auto"`` to look.
        name: the stored name; default: of the source.
        classes: the number of classes; default: the largest label plus one.
        source: a sentence on origin and licence.
        overwrite: replace ``out`` if it exists.
        **options: for CSV ``label`` (name or index of the column) and ``header`` (bool); for CSV and an npz
            without a test part ``test_fraction`` and ``seed``. None means the default.

    Raises:
        UsageError: anything wrong with the source, the options, or the disk.
    """
    path = Path(src).expanduser()
    if not path.exists():
        raise UsageError(f"{path}: not found, expected a file or folder to import; check the path")
    if kind != "auto" and kind not in KINDS:
        raise unknown("format", kind, [*KINDS, "auto"])
    kind = detect(path) if kind == "auto" else kind
    reader = KINDS[kind].read
    given = {key: value for key, value in options.items() if value is not None}
    accepted = [p for p in inspect.signature(reader).parameters if p != "src"]
    for key in given:
        if key not in accepted:
            raise UsageError(
                f"option {key} does not apply to {kind} ({path}); "
                f"{kind} takes {', '.join(accepted) or 'no options'}"
            )
    try:
        arrays = reader(path, **given)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); check the file and its permissions") from error
    changes = {"name": name, "classes": classes, "source": source}
    arrays = replace(arrays, **{key: value for key, value in changes.items() if value is not None})
    return write_dataset(out, arrays, overwrite=overwrite, where=path)
