"""Collectives through rank 0 that outlive the other ranks, with real deaths."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.mpi import MpiRun

WRAPPER = """#!/bin/sh
trap '' USR1
"$@"
exit 0
"""

PROGRAM = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
from hpcasync.comm.star import RankDied, Star

me, told = MPI.COMM_WORLD.rank, []
star = Star(MPI.COMM_WORLD, lambda rank, when: told.append(rank))
assert star.allgather(me) == [0, 1, 2, 3]
assert star.scatter([10, 11, 12, 13] if me == 0 else None) == 10 + me
assert star.bcast(me, root=3) == 3
assert star.gather(me) == ([0, 1, 2, 3] if me == 0 else None)
total = np.ones(3)
star.sum(total)
assert (total == 4).all()
dies, deaths = {2: 50, 1: 90}, []
for i in range(200):
    if dies.get(me) == i:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        assert set(star.allgather((i, bytes(1000 * i)))) == {(i, bytes(1000 * i))}
    except RankDied as error:
        gone = star.shrink()
        deaths.append((gone, i))
        assert star.allgather(i) == [i] * star.size  # all are at the same operation
assert deaths == [([2], 50), ([1], 90)], deaths
assert star.rank == [0, 3].index(me) and star.size == 2
assert me or (told == [2, 1] and sorted(star.deaths) == [1, 2])
with open(f"{sys.argv[1]}/{me}", "w") as file:
    file.write("ok")
os._exit(0)
"""


def test_the_living_agree_and_go_on(mpirun: MpiRun, tmp_path: Path) -> None:
    # Hydra kills a node's ranks when its own child is killed: each has a shell around it that outlives it.
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    lane = mpirun.lane
    outlive = "-disable-auto-cleanup" if lane.name == "mpich" else "--continuous"
    command = [lane.mpiexec, *lane.flags, outlive, "-n", "4", wrapper, lane.python, program, tmp_path]
    subprocess.run(list(map(str, command)), env=os.environ | lane.env, timeout=250, check=False)
    assert (tmp_path / "0").read_text() == (tmp_path / "3").read_text() == "ok"
    assert not (tmp_path / "1").exists() and not (tmp_path / "2").exists()
