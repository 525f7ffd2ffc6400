"""Read many spoilt files of one kind, in a process of its own: ``python -m tests.fuzz.child KIND FOLDER EXAMPLES SEED``.

A crash, endless memory or endless time then ends this process, and the last file written is the one that did it.
"""

from __future__ import annotations

import gzip
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import h5py  # noqa: F401  (loaded before the limits: what a reader needs itself is not what it is measured on)
import torch  # noqa: F401
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hpcasync.errors import UsageError
from tests.fuzz.mutations import BYTES, CONTENTS, WHOLE, spoil, spoil_contents
from tests.fuzz.readers import READERS

ROOM = 2 << 30  # bytes that a reader may ask for, beyond what is loaded
SECONDS = 10  # of the processor, for one file of a few kilobytes; a loaded machine may need much longer
STILL = 300  # for one that waits for something


def fuzz(kind: str, folder: Path, examples: int, number: int) -> None:
    reader = READERS[kind]
    target = reader.make(folder)
    good = target.read_bytes()
    if kind != "cifar-evil":
        reader.read(target)  # the good file is read
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.RLIM_INFINITY))
    hows: list[Any] = [st.tuples(st.just("bytes"), BYTES), st.tuples(st.just("whole"), WHOLE)]
    if reader.contents:
        hows.append(st.tuples(st.just("contents"), CONTENTS))

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, print_blob=False, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(hows))
    def one(how: tuple[str, Any]) -> None:
        content = good
        if how[0] == "whole":
            content = how[1]
        elif how[0] == "bytes":
            inner = gzip.decompress(good) if reader.packed else good
            content = spoil(inner, how[1])
        if reader.packed:
            content = gzip.compress(content, 1)
        target.unlink(missing_ok=True)
        target.write_bytes(content)
        if how[0] == "contents":
            spoil_contents(target, how[1])
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # each ends the process: a hang is a failure
        signal.alarm(STILL)
        try:
            reader.read(target)
        except UsageError:
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    one()


if __name__ == "__main__":
    slow = READERS[sys.argv[1]].slow
    fuzz(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) // (3 if slow else 1), int(sys.argv[4]))
    print("read all")
