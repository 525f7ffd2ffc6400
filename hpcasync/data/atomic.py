"""Write a file so that its final name only ever holds a whole file, whatever dies or fills up meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from hpcasync.errors import UsageError

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}


@contextlib.contextmanager
def replacing(path: Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well it becomes ``path`` in one step.

    Several processes, also on several nodes, may do this for one path at once: each writes its own file and
    the last rename wins. When the block fails, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: the final file; missing folders are made.
        needed: bytes about to be written, checked against the free space before anything is.

    Raises:
        UsageError: no space, no permission to write there, or a folder is there.
    """
    if not path.name or path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; expected the name of a file, in it or elsewhere")
    temp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise UsageError(
                f"cannot write {path}: the disk is full ({free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB "
                "needed); free some space or choose another folder"
            )
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        _remove(temp)
        raise _explain(error, path) from error
    except BaseException:
        _remove(temp)
        raise


def check_writable(path: Path, *, needed: int) -> None:
    """Find out, before long work, whether ``path`` could be written: ``needed`` bytes go to disk beside it and away again.

    Raises:
        UsageError: no space, or no permission to write there.
        OSError: what else the system says.
    """
    with contextlib.suppress(_Enough), replacing(path) as temporary:
        temporary.write_bytes(bytes(needed))
        _sync(temporary)
        raise _Enough


class _Enough(Exception):
    """Leaves `replacing` before anything gets the final name."""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is what matters.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def _remove(temp: Path) -> None:
    with contextlib.suppress(OSError):  # a missing or read-only folder holds no temporary file either
        temp.unlink(missing_ok=True)


def _explain(error: OSError | RuntimeError, path: Path) -> Exception:
    for code, words in _NO_SPACE.items():
        # HDF5 wraps the system error: its number is sometimes only in the text.
        if getattr(error, "errno", None) == code or f"errno = {code}," in str(error):
            return UsageError(f"cannot write {path}: {words}; free some space or choose another folder")
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or (
        isinstance(error, OSError) and error.errno == errno.EROFS
    ):
        return UsageError(f"cannot write {path}: {error.strerror or error}; choose a folder you may write to")
    # Of what the caller does meanwhile a missing file is another matter.
    if isinstance(error, FileNotFoundError) and (
        path.name in str(error.filename) or Path(str(error.filename)) in path.parents
    ):
        return UsageError(f"cannot write {path}: its folder has gone, or holds no files; choose another folder")
    return error
