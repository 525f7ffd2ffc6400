"""Many command lines in one job: a launch takes seconds, a refused command milliseconds, a short training less than one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mpi import MpiRun

# main() returns on every rank and the next case follows. Any rank left behind would hang the job.
PROGRAM = """
import contextlib, io, json, sys
from hpcasync import init
from hpcasync.cli import main

world = init()
found = []
for argv in json.load(open(sys.argv[1])):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    found.append([code, err.getvalue(), out.getvalue()])
everyone = world.gather(found)
if world.rank == 0:
    print(json.dumps(everyone))
"""


def run_cases(mpirun: MpiRun, cases: Sequence[Sequence[str | Path]], n: int | None, **options: Any) -> list[list[Any]]:
    """Run hpcasync with each of ``cases`` in turn; per rank and case: exit code, standard error, standard output."""
    (mpirun.folder / "cases.json").write_text(json.dumps([[str(word) for word in argv] for argv in cases]))
    done = mpirun(PROGRAM, n, args=["cases.json"], **{"timeout": 120, **options})
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
