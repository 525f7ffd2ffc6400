"""Which third process a one-sided operation waits for.

Two network namespaces, two ranks each. Rank 1 lets MPI go on all the time, rank 0, the first of its node, sleeps out of MPI for
some seconds. Rank 3, on the other host, times operations on rank 1, which should not notice the sleeper: the first put of the
window's life ("cold"), and a put and a Fetch_and_op after one put while all were in MPI ("warm"). Both MPI libraries.
Needs the test tools (make test), whose hosts it uses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SLEEP = 4.0

PROGRAM = """
import threading, time
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
window = MPI.Win.Create(np.zeros(64, np.int64), 1, comm=comm)
window.Lock_all(MPI.MODE_NOCHECK)
probe, awake = comm.Dup(), threading.Event()
one, word = np.ones(1, np.int64), np.zeros(1, np.int64)

def put():
    window.Put((one, MPI.INT64_T), 1, (0, 1, MPI.INT64_T))

def fetch_and_op():
    window.Fetch_and_op((one, MPI.INT64_T), (word, MPI.INT64_T), 1, 8, MPI.SUM)

def milliseconds(operation):
    began = time.perf_counter()
    operation()
    window.Flush(1)
    return 1e3 * (time.perf_counter() - began)

if WARM and comm.rank == 3:
    milliseconds(put)
comm.Barrier()
if comm.rank == 3:
    time.sleep(SLEEP / 8)
    first, again, atomic = map(milliseconds, (put, put, fetch_and_op))
    print(f"WARM: put {first:.1f} ms, again {again:.1f} ms, Fetch_and_op {atomic:.1f} ms", flush=True)
elif comm.rank == 1:
    end = time.monotonic() + SLEEP
    while time.monotonic() < end:
        probe.Iprobe()
        time.sleep(0.0005)
else:
    time.sleep(SLEEP)
comm.Barrier()
window.Unlock_all()
window.Free()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a shorter sleep")
    sleep = SLEEP / 4 if parser.parse_args().quick else SLEEP
    sys.path.insert(0, str(REPO))
    from tests.hosts import Hosts, HostsRun, missing
    from tests.mpi import LANES, find_lane

    if missing():
        sys.exit(f"bystander.py: {missing()}")
    for lane in [found for name in LANES if (found := find_lane(name))]:
        with Hosts(2) as hosts, tempfile.TemporaryDirectory() as folder:
            for warm in (False, True):
                program = PROGRAM.replace("if WARM", f"if {warm}").replace("WARM", "warm" if warm else "cold")
                done = HostsRun(lane, Path(folder), hosts)(program.replace("SLEEP", str(sleep)), 4)
                print(f"{lane.name}, {done.stdout.strip()} (rank 0 asleep for {sleep:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
