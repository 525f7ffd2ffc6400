"""Writes scalars for TensorBoard, in a thread of its own: a slow or full disk never holds up the training."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError

FLUSH_SECONDS = 10.0
"""What is written reaches the disk at least so often."""


def check_tensorboard(needed: bool) -> None:
    """Raise ``UsageError`` if the package that writes for TensorBoard is ``needed`` and missing."""
    if needed and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError(
            f"--tensorboard needs the package tensorboardX, which is not installed in {sys.prefix}; "
            "install it: pip install 'hpcasync[tensorboard]', or leave --tensorboard out"
        )


class EventFiles:
    """One event file per curve: TensorBoard shows those of one folder under that folder's name.

    Not tensorboardX's own ``SummaryWriter``: its thread dies of a full disk, and then its queue blocks for ever (2.6.5).

    Args:
        folder: of all; made.

    Raises:
        UsageError: the folder can't be made, or the package is missing.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard(True)
        try:
            importlib.import_module("tensorboardX")  # now, not beside the training
        except Exception as error:
            raise UsageError(f"tensorboardX in {sys.prefix} can't be imported: {error}; install it anew") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"tensorboard folder {folder} can't be made: {error.strerror}; give another one") from error
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._queue: queue.SimpleQueue[tuple[str, float, int, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hpcasync-tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: float, name: str = "") -> None:
        """Write a point of each curve; returns at once.

        Args:
            values: by tag.
            step: place on the axis.
            name: folder inside the folder: a curve of its own under the same tags.
        """
        self._put((name, time.time(), int(step), dict(values)))

    def text(self, tag: str, text: str, step: float = 0) -> None:
        """Write a text in Markdown."""
        self._put(("", time.time(), int(step), (tag, text)))

    def purge(self, step: float) -> None:
        """What earlier files in the folder tell from ``step`` on is not shown any more: a run goes on from there."""
        names = [""] + [path.name for path in self._folder.iterdir() if path.is_dir()]
        for name in names:
            self._put((name, time.time(), int(step), None))

    def close(self) -> None:
        """Write what is left; a disk that hangs is waited for for a minute."""
        self._queue.put(None)
        self._thread.join(60)

    def _put(self, item: tuple[str, float, int, Any]) -> None:
        if self._thread.is_alive():  # else nobody would take it away
            self._queue.put(item)

    def _run(self) -> None:
        flushed = time.monotonic()
        try:
            while (item := self._next()) is not None:
                if item:
                    self._write(*item)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    for file in self._files.values():
                        file.flush()
                    flushed = time.monotonic()
            for file in self._files.values():
                file.flush()
                file.close()
        except OSError as error:
            for file in self._files.values():
                with contextlib.suppress(OSError):
                    file.close()
            print(
                f"hpcasync: warning: can't write for TensorBoard into {self._folder}: {error.strerror}; the run goes on without",
                file=sys.stderr,
                flush=True,
            )

    def _next(self) -> Any:
        """What to write, None at the end, nothing after a while."""
        try:
            return self._queue.get(timeout=FLUSH_SECONDS)
        except queue.Empty:
            return ()

    def _write(self, name: str, when: float, step: int, what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        if name not in self._files:
            self._files[name] = self._open(name)
        if what is None:
            event = Event(wall_time=when, step=step, session_log=SessionLog(status=SessionLog.START))
        elif isinstance(what, tuple):
            event = Event(wall_time=when, step=step, summary=text(*what))
        else:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in what.items()]
            event = Event(wall_time=when, step=step, summary=Summary(value=values))
        self._files[name].write(event.SerializeToString())

    def _open(self, name: str) -> Any:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event

        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"))
        file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        return file
