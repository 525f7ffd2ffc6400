"""Linux's ``/proc/<pid>/stat``: state, parent, group, start of a process."""

from __future__ import annotations

from pathlib import Path

STATE, PARENT, GROUP, TERMINAL, FOREGROUND, STARTED = 0, 1, 2, 4, 5, 19
"""Places in what `process_stat` returns; `STARTED` is in ticks since the boot: numbers of processes are used again."""


def process_stat(pid: int) -> list[str]:
    """The fields of a process after its name, see proc(5); empty for one that is gone, and where there is no /proc."""
    try:
        found = Path(f"/proc/{pid:d}/stat").read_bytes()
    except OSError:
        return []
    return found.rpartition(b")")[2].decode("ascii", "replace").split()  # the name before may be any bytes, and hold a ")"


def started(pid: int) -> str:
    """When a process began, in ticks since the boot; empty if there is none."""
    fields = process_stat(pid)
    return fields[STARTED] if len(fields) > STARTED else ""
