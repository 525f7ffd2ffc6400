"""All checks in their order, each with a time limit."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpcasync.comm import World, init
from hpcasync.comm.launch import launched_rank
from hpcasync.doctor.launch import check_launch
from hpcasync.doctor.line import Line, fail, worst
from hpcasync.errors import UsageError

SECONDS = 120.0
"""A check that takes longer hangs: some library waits for what never comes."""

Told = Callable[[Line], None]


def examine(folder: Path, tell: Told = lambda line: None, stuck: Callable[[], None] = lambda: None) -> list[Line]:
    """Run every check. Collective; where the launcher and MPI disagree every task is alone.

    Args:
        folder: where runs will write.
        tell: called with each line as it is found, on rank 0.
        stuck: called on rank 0 before a hanging check ends the job.
    """
    first = launched_rank() == 0
    lines: list[Line] = []

    def add(found: list[Line]) -> None:
        lines.extend(found)
        for line in found if first else ():
            tell(line)

    def hang(name: str) -> None:
        add(
            [
                fail(
                    name,
                    f"no end after {SECONDS:.0f} s",
                    "it hangs in a library or its network: look at what the last ok line leaves",
                )
            ]
        )
        if first:
            stuck()
        else:
            time.sleep(SECONDS / 10)  # the launcher ends rank 0 with us: let it speak
        sys.stdout.flush()
        os._exit(1)

    add(check_launch())
    if worst(lines) == "fail":
        return lines  # there is no world to look at
    try:
        world = init()
    except UsageError as error:
        add([fail("start", str(error), "see the message")])
        return lines
    first = world.rank == 0
    for name, check in _checks(folder).items():
        watchdog = threading.Timer(SECONDS, hang, (name,))
        watchdog.daemon = True
        watchdog.start()
        add(_run(world, name, check))
        watchdog.cancel()
    return lines


def _checks(folder: Path) -> dict[str, Callable[[World], list[Line]]]:
    from hpcasync.doctor import backends, machine, speed, windows

    return {
        "node map": machine.check_nodes,
        "oversubscription": machine.check_cores,
        "devices": machine.check_devices,
        "shared memory": machine.check_shared_memory,
        "windows": windows.check_windows,
        "updates": speed.check_updates,
        "bandwidth": speed.check_bandwidth,
        "collectives": backends.check_backends,
        "HDF5": lambda world: machine.check_hdf5(world, folder),
    }


def _run(world: World, name: str, check: Callable[[World], list[Line]]) -> list[Line]:
    """A check's lines; an error of the same kind on every rank is a line too, one on some ranks only ends the job."""
    found: list[Line] = []
    problem = None
    try:
        found = check(world)
    except UsageError as error:
        problem = str(error)
    except Exception as error:
        if world.size == 1:
            problem = f"{type(error).__name__}: {error}"
        else:
            raise
    problems = [p for p in world.gather(problem) if p is not None]
    return [fail(name, problems[0], "see the message; if it does not help, please report it")] if problems else found
