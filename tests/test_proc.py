"""What /proc tells of a process."""

from __future__ import annotations

import os
import subprocess
import sys

from hpcasync.proc import GROUP, PARENT, STATE, process_stat, started

RENAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) \\xff R 1'); print(flush=True); input()"
"""A process with a bracket and no text in its name."""


def test_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", RENAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        fields = process_stat(child.pid)
        assert fields[STATE] in "RSD" and fields[PARENT] == str(os.getpid()) and fields[GROUP] == str(os.getpgid(child.pid))
        assert int(started(child.pid)) >= int(started(os.getpid()))
        child.stdin.close()
    assert process_stat(child.pid) == [] and started(child.pid) == ""
