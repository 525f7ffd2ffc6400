"""The Python environment as one file, for the nodes' own disks."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from pathlib import Path

from hpcasync.errors import UsageError


def archive_of(prefix: Path) -> Path:
    """Where the archive of an environment is kept; another name once a file of it has changed.

    Raises:
        UsageError: no environment of its own.
    """
    if not (prefix / "pyvenv.cfg").exists() and not (prefix / "conda-meta").is_dir():
        raise UsageError(
            f"--broadcast copies a virtual or conda environment to the nodes, and {prefix} is neither; "
            "install hpcasync in one, or leave it with --no-broadcast"
        )
    from hpcasync.data.resolve import cache_folder  # only here: its package brings torch along

    digest = hashlib.sha256(os.fspath(prefix).encode())
    for folder, folders, files in os.walk(prefix):
        folders[:] = sorted(set(folders) - {"__pycache__"})  # Python adds to those by itself
        for name in sorted(files):
            status = os.lstat(os.path.join(folder, name))
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return cache_folder() / "environments" / f"{prefix.name}-{digest.hexdigest()[:16]}.tar"


def pack(prefix: Path = Path(sys.prefix)) -> Path:
    """Pack an environment unless that is done, and return the archive. What lies outside of it stays where it is.

    Raises:
        UsageError: no environment of its own, or no room for the archive.
    """
    archive = archive_of(prefix)
    if not archive.exists():
        from hpcasync.data.atomic import replacing

        with replacing(archive) as temporary, tarfile.open(temporary, "w") as tar:
            tar.add(prefix, arcname=".")
    return archive
