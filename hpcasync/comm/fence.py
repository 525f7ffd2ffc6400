"""Ends a process of this node that holds up the others, so that it cannot wake and write."""

from __future__ import annotations

import os
import signal

from hpcasync.proc import started


def fence(pid: int, when: str) -> None:
    """Kill the process ``pid``, also a stopped one, if it is the one that ``started`` then, not another with its number."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if started(pid) == when:  # what the descriptor means does not change any more
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)
