"""The file of a checkpoint: HDF5 behind a block of 512 bytes with the format's version, the size and a checksum.

Nothing of a file reaches the HDF5 library before the checksum over all its bytes has been found right. The block is a "user
block" of HDF5: h5py, h5dump and the like read the file as any other. Its layout is the same in all versions of the format.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError

FORMAT, VERSION = "hpcasync-checkpoint", 1
BLOCK = 512
_HEAD = re.compile(rb"hpcasync-checkpoint ([0-9]{5}) ([0-9]{20}) ([0-9a-f]{64})\n\0*")
_BLANK = "0" * 64
_READ = 1 << 22


class DamagedError(UsageError):
    """A file that is no whole checkpoint."""


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[h5py.File]:
    """Yield a new HDF5 file; when the block ends well it is ``path``: whole, checksummed, and synced with its folder.

    Args:
        path: the final name, which only ever holds a whole file.
        needed: bytes about to be written.

    Raises:
        UsageError: no space, or no permission to write there. What was at ``path`` stays.
    """
    with replacing(path, needed=needed) as temporary, open(temporary, "xb+", buffering=0) as raw:
        steady = _Steady(raw)
        try:
            with h5py.File(steady, "w", userblock_size=BLOCK, libver="v110", track_order=True) as file:
                yield file
        except Exception:
            if steady.error is None:
                raise
        if steady.error is not None:
            raise steady.error
        _seal(raw)


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Yield the HDF5 file, found whole.

    Raises:
        DamagedError: truncated, damaged, or something else than a checkpoint.
        UsageError: not there, not readable, or of a newer format.
    """
    try:
        raw = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"checkpoint {path}: {error.strerror}; expected a file that hpcasync wrote") from error
    with raw:
        _check(path, raw)
        try:
            file = h5py.File(raw, "r")
        except OSError as error:
            raise DamagedError(f"checkpoint {path}: its checksum is right but HDF5 can't read it ({error})") from error
        with file:
            yield file


class _Steady:
    """A file that never fails towards HDF5, which can't take an error while it closes; the first error is kept."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                done = 0
                while done < len(view):
                    done += self._raw.write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        if self.error is None:
            try:
                return int(self._raw.truncate(size))
            except OSError as error:
                self.error = error
        return size or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def read(self, size: int = -1) -> bytes:
        return bytes(self._raw.read(size))

    def readinto(self, buffer: Any) -> int:
        return int(self._raw.readinto(buffer))

    def flush(self) -> None:
        pass


def _head(version: int, size: int, digest: str) -> bytes:
    return f"{FORMAT} {version:05d} {size:020d} {digest}\n".encode().ljust(BLOCK, b"\0")


def _digest(raw: BinaryIO, version: int, size: int) -> str:
    """SHA-256 of the whole file, the block with zeros in the place of the digest itself."""
    total = hashlib.sha256(_head(version, size, _BLANK))
    raw.seek(BLOCK)
    while block := raw.read(_READ):
        total.update(block)
    return total.hexdigest()


def _seal(raw: Any, version: int = VERSION) -> None:
    size = raw.seek(0, os.SEEK_END)
    head = _head(version, size, _digest(raw, version, size))
    raw.seek(0)
    if raw.write(head) != BLOCK:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check(path: Path, raw: Any) -> None:
    try:
        head = raw.read(BLOCK)
        size = raw.seek(0, os.SEEK_END)
        found = _HEAD.fullmatch(head)
        if found is None or len(head) < BLOCK:
            raise DamagedError(f"checkpoint {path}: it does not begin as a checkpoint of hpcasync does ({head[:24]!r}...)")
        version, expected, digest = int(found[1]), int(found[2]), found[3].decode()
        if size != expected:
            raise DamagedError(f"checkpoint {path}: it has {size:,} bytes, expected {expected:,}: it is truncated or damaged")
        if _digest(raw, version, size) != digest:
            raise DamagedError(f"checkpoint {path}: its checksum is wrong: it is damaged")
    except OSError as error:
        raise DamagedError(f"checkpoint {path}: can't be read ({error.strerror})") from error
    if version != VERSION:
        raise UsageError(
            f"checkpoint {path} has format {version}, this hpcasync reads {VERSION}; "
            + ("update hpcasync" if version > VERSION else "use the version of hpcasync that wrote it")
        )
