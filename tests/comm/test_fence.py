"""A process is killed only if it is the one that was meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from hpcasync.comm.fence import fence
from hpcasync.proc import started


def test_only_the_one_that_was_meant_and_also_when_it_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        when = started(process.pid)
        assert when
        process.send_signal(signal.SIGSTOP)
        fence(process.pid, str(int(when) - 1))  # another one that had this number before
        os.kill(process.pid, 0)
        assert process.poll() is None
        fence(process.pid, when)
        assert process.wait(60) == -signal.SIGKILL
        fence(process.pid, when)  # gone: nothing to do
    finally:
        process.kill()
        process.communicate()
