"""A command on a real pseudo-terminal, and the screen that it draws, as a terminal emulator (pyte) shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence

import pyte

from tests.mpi import processes_of


class Terminal:
    """A terminal with a command in its foreground. A context manager; whatever carries ``token`` is killed at its end.

    Args:
        command: gets the terminal as its controlling one, and as standard input, output and error.
        env: the command's environment.
        token: see `tests.mpi.TOKEN`.
        columns, lines: size of the terminal.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], token: str, cwd: object, columns: int = 100, lines: int = 30
    ) -> None:
        self._token = token
        self.screen = pyte.HistoryScreen(columns, lines, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.seen = b""
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            list(command),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm-256color"},
            cwd=str(cwd),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in {*processes_of(self._token), *([self.process.pid] if self.process.poll() is None else [])}:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait(30)
        os.close(self._master)

    def resize(self, columns: int, lines: int) -> None:
        """Make the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def type(self, text: str) -> None:
        """What a user types."""
        os.write(self._master, text.encode())

    def read(self, seconds: float) -> bool:
        """Show what comes within ``seconds``; whether the terminal is still open."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._master], [], [], left)[0]:
                try:
                    data = os.read(self._master, 1 << 16)
                except OSError:  # nobody has it open any more
                    return False
                self.seen += data
                self._stream.feed(data)
        return True

    @property
    def lines(self) -> list[str]:
        """What the screen shows."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def past(self) -> list[str]:
        """What has scrolled out above it."""
        rows = self.screen.history.top
        return ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]

    def wait_for(self, what: Callable[[list[str]], object], timeout: float = 240) -> list[str]:
        """The first screen for which ``what`` is true."""
        deadline = time.monotonic() + timeout
        while True:
            if what(self.lines):
                return self.lines
            is_open = self.read(0.05)
            if what(self.lines):
                return self.lines
            shown = "\n".join([*self.past, "-- screen", *self.lines])
            assert is_open, f"the terminal was closed; it showed\n{shown}"
            assert time.monotonic() < deadline, f"not seen in {timeout} s; the terminal shows\n{shown}"

    def wait(self, timeout: float = 240) -> int:
        """The command's exit status, after all that it and its children have written."""
        deadline = time.monotonic() + timeout
        while self.read(0.2):
            shown = "\n".join([*self.past, "-- screen", *self.lines])
            assert time.monotonic() < deadline, f"no end in {timeout} s; the terminal shows\n{shown}"
        return self.process.wait(60)
