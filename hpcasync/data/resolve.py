"""From what the user wrote after ``--data`` to an HDF5 file on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from hpcasync.data.importer import import_dataset
from hpcasync.data.public import EMBEDDED, PUBLIC, Public, canonical, known
from hpcasync.errors import UsageError, unknown


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of imported public data: ``cache``, else ``$HPCASYNC_CACHE``, else the user's own."""
    chosen = cache or os.environ.get("HPCASYNC_CACHE")
    if chosen:
        return Path(chosen)
    import pooch  # only here: reading a file needs no download library

    return Path(pooch.os_cache("hpcasync"))


def resolve(source: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The HDF5 file of ``source``; a public set's raw files are imported into the cache the first time.

    A known name wins over a file of that name: write ``./mnist`` for the file. Raw files are looked for under
    ``$HPCASYNC_DATA`` in ``mnist``, ``fashion_mnist``, ``cifar-10-batches-py``, ``cifar-100-python``; that
    folder is only read. Any number of processes may call this at once.

    Args:
        source: a name from `known` or the path of an imported file.
        cache: where imported sets are kept (default ``$HPCASYNC_CACHE``, else the user's cache folder).

    Raises:
        UsageError: an unknown name, no such file, or a public set that is neither imported nor here in raw
            form.
    """
    text = os.fspath(source)
    name = canonical(text) if isinstance(source, str) else None
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name in PUBLIC:
        return _public(PUBLIC[name], cache_folder(cache))
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder, expected an HDF5 file or a known name; import it with "
            f"'hpcasync data import {path} --out FILE'"
        )
    if path.suffix or len(path.parts) > 1:
        raise UsageError(
            f"data file {path}: not found, expected an imported HDF5 file or one of "
            f"{', '.join(known())}; check the path"
        )
    raise unknown("data set", text, known(), "Or give the path of an imported HDF5 file.")


def _public(entry: Public, cache: Path) -> Path:
    out = cache / f"{entry.name}.h5"
    if out.is_file():
        return out
    root = os.environ.get("HPCASYNC_DATA")
    raw = Path(root).expanduser() / entry.folder if root else None
    if raw is not None and raw.is_dir():
        return import_dataset(raw, out, kind=entry.kind, name=entry.name, source=entry.source, overwrite=True)
    looked = f"{raw} does not exist" if raw else "HPCASYNC_DATA is not set"
    raise UsageError(
        f"data set {entry.name!r} is not on this machine: {out} does not exist and {looked}; run "
        f"'hpcasync data fetch {entry.name}', or set HPCASYNC_DATA to the folder that holds "
        f"{entry.folder}/"
    )
