"""Download a public data set, check it, and import it into the cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from hpcasync.data.importer import import_dataset
from hpcasync.data.public import EMBEDDED, canonical, public
from hpcasync.data.resolve import cache_folder
from hpcasync.errors import UsageError


def fetch(
    name: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
    progress: Any = None,
) -> Path:
    """Download ``name`` unless it is in the cache already; return the imported HDF5 file.

    Args:
        name: a public set: ``mnist``, ``fashion-mnist``, ``cifar-10``, ``cifar-100``.
        cache: the folder to keep it in (default ``$HPCASYNC_CACHE``, else the user's cache folder).
        mirror: the address of a folder that holds the same files, in place of the official one.
        progress: drawn while downloading: anything with ``total``, ``update(n)``, ``reset()`` and
            ``close()``.

    Raises:
        UsageError: an unknown name, an unreachable server, a wrong checksum, or a full disk.
    """
    embedded = canonical(name)
    if embedded in EMBEDDED:
        return EMBEDDED[embedded]
    entry = public(name)
    folder = cache_folder(cache)
    out = folder / f"{entry.name}.h5"
    if out.is_file():
        return out
    base = (mirror or entry.url).rstrip("/")
    raw = folder / "raw" / entry.name
    for file, known_hash in entry.files.items():
        _download(f"{base}/{file}", known_hash, raw, file, progress)
    src = raw / next(iter(entry.files)) if len(entry.files) == 1 else raw
    return import_dataset(src, out, kind=entry.kind, name=entry.name, source=entry.source, overwrite=True)


def _download(url: str, known_hash: str, folder: Path, file: str, progress: Any) -> None:
    import pooch  # these two only when something is really downloaded
    import requests

    pooch.get_logger().setLevel("WARNING")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write there")
        with tempfile.TemporaryDirectory(dir=folder) as own:
            # Each process downloads into its own folder; the checked file then moves into place in one step.
            if not _intact(folder / file, known_hash):
                pooch.retrieve(url, known_hash, fname=file, path=own, progressbar=progress or False)
                os.replace(Path(own) / file, folder / file)
    except requests.exceptions.RequestException as error:
        raise UsageError(
            f"cannot download {url}: {_reason(error)}; check the network, or give another server that "
            "holds the file (mirror)"
        ) from error
    except ValueError as error:
        if "hash" not in str(error):
            raise UsageError(
                f"cannot download {url}: {error}; give the address of a folder, http://..."
            ) from error
        raise UsageError(
            f"{url}: the downloaded file has another checksum, expected {known_hash}; the server or its "
            f"mirror holds a different or damaged file, try another ({error})"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot write {folder / file}: {error.strerror or error}; free some space or choose another "
            "cache folder"
        ) from error


def _intact(path: Path, known_hash: str) -> bool:
    import pooch

    *algorithm, digest = known_hash.split(":")
    return path.is_file() and bool(
        pooch.file_hash(str(path), alg=algorithm[0] if algorithm else "sha256") == digest
    )


def _reason(error: Exception) -> str:
    """The innermost cause, in one line: requests wraps urllib3, which wraps the system's own words."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    return " ".join(str(inner).split())[:200]
