"""Was this job started well: the MPI library, its thread level, the launcher. Needs no `World`: there may be none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hpcasync.comm.launch import check_world, launched_tasks
from hpcasync.doctor.line import Line, fail, ok, warn
from hpcasync.errors import UsageError


def check_launch() -> list[Line]:
    """The lines on MPI, before anything of it is used."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        tasks, launcher = launched_tasks()
        remedy = "pip install 'hpcasync[mpich]', or on a cluster load the site's MPI module"
        if tasks > 1:
            return [fail("MPI", f"{launcher} started {tasks} tasks, but {sys.prefix} can't load MPI: {error}", remedy)]
        return [warn("MPI", f"none: one rank only ({error})", remedy)]
    library = " ".join(MPI.Get_library_version().rstrip("\x00").split("\n")[0].split())
    return [_library(MPI, library), _thread_level(MPI), _launcher(MPI.COMM_WORLD.size, library)]


def _library(MPI: Any, library: str) -> Line:
    import mpi4py

    found = f"{library}, MPI {'.'.join(map(str, MPI.Get_version()))}, mpi4py {mpi4py.__version__}"
    several = sorted(loaded_libraries())
    if len(several) > 1:
        text = f"{found}; two MPI libraries in one process: {', '.join(several)}"
        return fail(
            "MPI", text, "they crash each other: leave one of them out of LD_PRELOAD, LD_LIBRARY_PATH and the environment"
        )
    if MPI.Get_version() < (3, 0):
        return fail("MPI", found, "one-sided shared memory came with MPI 3.0: use a newer library")
    return ok("MPI", found)


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> set[str]:
    """The MPI libraries that this process has mapped."""
    if not maps.exists():
        return set()
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "/libmpi" in line}
    return {path for path in paths if re.match(r"libmpi(ch)?(_cray\w*|_gnu\w*|_intel)?\.so", Path(path).name)}


def _thread_level(MPI: Any) -> Line:
    names = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    level = MPI.Query_thread()
    if level == MPI.THREAD_MULTIPLE:
        return ok("thread level", "multiple")
    remedy = "leave mpi4py.rc.thread_level at 'multiple', or use an MPI built with MPI_THREAD_MULTIPLE"
    return fail("thread level", names.get(level, str(level)), remedy)


def _launcher(size: int, library: str) -> Line:
    tasks, launcher = launched_tasks()
    try:
        check_world(size, library)
    except UsageError as error:
        found, _, rest = str(error).partition(". MPI here: ")
        return fail("launcher", found, rest.partition(". ")[2])
    if tasks not in (1, size):
        remedy = "variables of an outer job: start it from a shell of its own"
        return warn("launcher", f"{launcher} says {tasks} tasks, MPI sees {size}", remedy)
    return ok("launcher", f"{launcher or 'none'}: {size} rank{'s' * (size > 1)}")
