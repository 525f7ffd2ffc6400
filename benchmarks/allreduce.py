"""Every collective backend in one run: the sum of one buffer over the ranks of this node.

`window` and `mpi` are ours, `one MPI call` is MPI_Allreduce of the whole buffer, `gloo` is torch.distributed, `Horovod` takes
part where it is built. A round's time is that of the slowest rank. `copy` is one np.copyto of the buffer by every rank at once:
what the memory needs to read and write each byte once.

With more ranks than cores also the seconds that a late rank computes, while the others wait for it in a sum: by `mpi`, by one
MPI call, or asleep. What is above 1 they take from the rank that they wait for.

--openmpi runs it with the Open MPI environment that `make test` makes.
"""

from __future__ import annotations

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
    rows = []
    for ranks in args.ranks or ([2] if args.quick else [2, 4]):
        rows += launch(ranks, ["--rounds", str(rounds), "--sizes", *map(str, sizes)])
    finish(args, "allreduce", about, rows)


def work(args) -> None:
    """One rank."""
    from mpi4py import MPI

    import hpcasync
    from hpcasync.comm import make_collectives

    world = hpcasync.init(device="cpu", threads=1)
    backends = {"window": "window", "mpi": "mpi", "gloo": "torch"}
    try:
        make_collectives("horovod", world).close()
        backends["Horovod"] = "horovod"
    except hpcasync.UsageError as error:
        if world.rank == 0:
            print(f"without Horovod: {error}", flush=True)
    opened = {side: make_collectives(name, world) for side, name in backends.items()}
    report = Report(quiet=world.rank > 0)
    for size in args.sizes:
        count = size * MIB // 4
        sides, buffers = {}, {}
        for side, collectives in opened.items():
            (buffer,) = collectives.buffers([count], torch.float32, torch.device("cpu"))
            buffers[side] = buffer
            sides[side] = timed(lambda c=collectives, b=buffer: c.allreduce(b))
        whole, source = np.zeros(count, np.float32), np.zeros(count, np.float32)
        sides["one MPI call"] = timed(lambda w=whole: world.comm.Allreduce(MPI.IN_PLACE, w))
        sides["copy"] = timed(lambda t=whole, f=source: np.copyto(t, f))
        check(world, opened, buffers)
        for buffer in buffers.values():
            buffer.zero_()
        times = interleave(sides, args.rounds, meet=world.collectives.barrier, warm_up=2)
        times = {side: np.max(world.gather(values), axis=0) for side, values in times.items()}
        ratios = [Ratio("window", other, FASTER) for other in ("one MPI call", "Horovod", "gloo") if other in times]
        ratios += [Ratio("window", "mpi", 1.0), Ratio("window", "copy")]
        title = {"ranks": world.size, "MB": size}
        report.case(title, times, ratios, dict.fromkeys(times, 8 * count))
        del sides, buffers
    if world.local_size > len(os.sched_getaffinity(0)):
        late(args.rounds, world, opened["mpi"], report)
    for collectives in opened.values():
        collectives.close()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def late(rounds, world, collectives, report) -> None:
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
    times = interleave(sides, rounds, meet=world.collectives.barrier, warm_up=1)
    times = {name: np.max(world.gather(values), axis=0) for name, values in times.items()}
    asleep, ours, one = times
    report.case({"ranks": world.size, "late": "the last"}, times, [Ratio(ours, asleep), Ratio(one, asleep)])


def check(world, opened, buffers) -> None:
    """Every backend must give the sum."""
    for side, buffer in buffers.items():
        buffer.fill_(world.rank + 1)
        opened[side].allreduce(buffer)
        if not bool((buffer == world.size * (world.size + 1) / 2).all()):
            raise SystemExit(f"{side}: not the sum, the comparison is void")


if __name__ == "__main__":
    main()
