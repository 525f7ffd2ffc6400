"""A busy rank and the others' pushes and pulls: what each way of progress between nodes gives.

Two nodes with one rank each, rank 1 computes without a pause (matrix products of numpy; with --python pure Python, which holds
the GIL) in pieces of a second, out of MPI. Rank 0 pushes to and pulls from the shards that rank 1 holds, and the time of each is
recorded. Lanes: "nolocal", MPICH told that every rank is a node, over shared memory; "tcp", the same over TCP; "hosts", two
network namespaces with a link of 1 Gbit/s between them, MPICH or Open MPI by the environment that runs this. With host-rank each
node has a second rank that serves. Needs the test tools (make test), whose hosts it uses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import REPO, begin, finish, make_parser

LANES = {
    "nolocal": {"MPIR_CVAR_NOLOCAL": "1"},
    "tcp": {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"},
    "hosts": {},
}
PROGRESS = ("thread", "host-rank", "library")
TARGET = 0.020  # seconds, median
COUNT = 10_000  # elements of each of two shards


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--lanes", nargs="+", choices=list(LANES), default=list(LANES))
    parser.add_argument("--progress", nargs="+", choices=PROGRESS, help="default: all; the thread with --quick")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a case")
    parser.add_argument("--python", action="store_true", help="the busy rank runs pure Python")
    parser.add_argument("--bind", action="store_true", help="each rank to a core of its own, with its thread, as launchers do")
    args = parser.parse_args()
    args.progress = args.progress or list(PROGRESS[:1] if args.quick else PROGRESS)
    if args.worker:
        work(args.worker, args.progress[0], args.seconds, args.python, args.bind)
        return
    about = begin("progress")
    rows = []
    for lane in args.lanes:
        for progress in args.progress:
            flags = [name for name, on in (("--python", args.python), ("--bind", args.bind)) if on]
            row = launch_case(lane, progress, 2.0 if args.quick else args.seconds, flags)
            rows += [row] if row else []
    finish(args, "progress", about, rows)


def launch_case(lane: str, progress: str, seconds: float, flags: list[str]) -> dict | None:
    """Run one case on two nodes and print it."""
    sys.path.insert(0, str(REPO))
    from tests.hosts import Hosts, HostsRun, missing
    from tests.mpi import LANES as LIBRARIES
    from tests.mpi import MpiRun, find_lane

    found = [mpi for name in LIBRARIES if (mpi := find_lane(name)) and mpi.prefix == Path(sys.prefix)]
    if not found or (lane != "hosts" and found[0].name != "mpich"):
        print(f"\n{lane}: needs the MPICH wheel in the environment that runs this; left out", flush=True)
        return None
    ranks = 4 if progress == "host-rank" else 2
    if progress == "host-rank" and lane != "hosts":  # two nodes of two ranks
        LANES[lane].pop("MPIR_CVAR_NOLOCAL", None)
        LANES[lane] |= {"MPIR_CVAR_NUM_CLIQUES": "2", "MPIR_CVAR_CLIQUES_BY_BLOCK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        args = ["--worker", rows, "--progress", progress, "--seconds", seconds, *flags]
        if lane == "hosts" and missing():
            print(f"\nhosts: {missing()}; left out", flush=True)
            return None
        options = {"args": args, "env": dict(LANES[lane]), "timeout": 60 + 4 * seconds}
        if lane == "hosts":
            with Hosts(2) as hosts:
                HostsRun(found[0], Path(folder), hosts)(Path(__file__), ranks, **options)
        else:
            MpiRun(found[0], Path(folder))(Path(__file__), ranks, **options)
        times = json.loads(rows.read_text())
    row: dict = {"lane": lane, "progress": progress, "mpi": found[0].name, "flags": flags, "seconds": times, "ratios": []}
    print(f"\n{', '.join([lane, found[0].name, progress, *flags])}  (load {os.getloadavg()[0]:.1f})", flush=True)
    for what in ("push_pull", "pull"):
        t = times[what]
        verdict = "holds" if t["median"] <= TARGET else "MISSED"
        row["ratios"].append({"side": what, "to": "20 ms", "median": t["median"] / TARGET, "holds": t["median"] <= TARGET})
        print(
            f"  {what:<10} median {1e3 * t['median']:8.2f} ms  [{1e3 * t['q25']:.2f}, {1e3 * t['q75']:.2f}]  "
            f"max {1e3 * t['max']:.0f} ms, {t['count']} times  target 20 ms: {verdict}",
            flush=True,
        )
    return row


def work(rows: Path, progress: str, seconds: float, python: bool, bind: bool) -> None:
    """One rank."""
    import hpcasync as ha
    from hpcasync.rules import ASGD
    from hpcasync.store import RemoteStore, make_layout

    world = ha.init(threads=1, host_ranks=int(progress == "host-rank"))
    assert world.nodes == world.size == 2, world
    if bind:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})  # and so the threads that start from now on
    rule = ASGD(lr=1e-3)
    rule.warm_up()
    store = RemoteStore(world, make_layout([COUNT] * 2, COUNT), rule, progress=progress)
    store.publish(np.zeros(store.layout.total, np.float32))
    worker, out = store.worker(world.rank), np.zeros(store.layout.total, np.float32)
    grads, hypers = [np.ones(COUNT, np.float32)] * 2, [rule.hyper(rule.group_options())] * 2
    for _ in range(3):
        store.push_pull(worker, grads, out, hypers)
        store.pull(worker, out)
    store.barrier()
    deadline = time.monotonic() + seconds
    if world.rank == 1:
        busy(seconds, python)
        store.barrier()
    else:
        times: dict[str, list[float]] = {"push_pull": [], "pull": []}
        while time.monotonic() < deadline - 0.2:
            for what, call in (
                ("push_pull", lambda: store.push_pull(worker, grads, out, hypers)),
                ("pull", lambda: store.pull(worker, out)),
            ):
                began = time.perf_counter()
                call()
                times[what].append(time.perf_counter() - began)
                time.sleep(0.003)
        store.barrier()
        row = {}
        for what, values in times.items():
            q25, median, q75 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
            row[what] = {"median": median, "q25": q25, "q75": q75, "max": max(values), "count": len(values)}
        rows.write_text(json.dumps(row))
    store.close()


def busy(seconds: float, python: bool) -> None:
    """Compute for so long, out of MPI but for a moment after each second."""
    from mpi4py import MPI

    matrix = np.random.default_rng(0).random((300, 300))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        piece = time.monotonic() + min(1.0, seconds)
        while time.monotonic() < piece:
            if python:
                sum(i * i for i in range(10_000))
            else:
                matrix @ matrix
        MPI.COMM_SELF.Iprobe()


if __name__ == "__main__":
    main()
