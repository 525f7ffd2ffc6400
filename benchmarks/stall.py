"""What a watch over ranks that hang (`--stall-seconds`) costs a step: LeNet-5 in modes sync and kstep, watched and not, in
blocks in turn.

One model and one optimizer for both sides, batches of 28 x 28 samples, one thread per rank. `signs of a step` is what a step
leaves for the watch, alone: with warm caches.
"""

from __future__ import annotations

import json
import time

from _common import Ratio, Report, begin, finish, interleave, launch, make_parser, timed

TARGET = 1.01
SECONDS = 600  # the default of hpcasync train


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--batch", type=int, default=32, help="samples per step and rank (default: 32)")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 60)
    if args.worker:
        work(args)
        return
    about = begin("stall")
    options = ["--rounds", str(args.rounds), "--batch", str(args.batch)] + (["--quick"] if args.quick else [])
    rows = [row for ranks in args.ranks for row in launch(ranks, options)]
    finish(args, "stall", about, rows)


def work(args) -> None:
    """One rank."""
    import torch

    import hpcasync
    from hpcasync import KStep, Sync, models

    world = hpcasync.init(threads=1)
    report = Report(quiet=world.rank > 0)
    for kind in (Sync, KStep):
        torch.manual_seed(0)
        model = models.build("lenet5", (1, 28, 28), 10)
        options = {"every": 8} if kind is KStep else {}
        mode = kind(torch.optim.SGD(model.parameters(), 0.01), model=model, world=world, **options)
        measure(args, report, model, mode)
        mode.close()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def measure(args, report: Report, model, mode) -> None:
    """One mode: its steps, watched and not."""
    import torch
    import torch.nn.functional as F

    from hpcasync import StallWatch
    from hpcasync.comm.signs import GRADIENTS

    block = 8 if args.quick else 80
    x, y = torch.rand(args.batch, 1, 28, 28), torch.arange(args.batch) % 10
    world = mode.world

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(block):
            mode.zero_grad()
            F.cross_entropy(model(x), y).backward()
            mode.step()
        return (time.perf_counter() - began) / block

    def watched() -> float:
        with StallWatch(mode, SECONDS):
            return steps()

    times = interleave({"watched": watched, "not watched": steps}, args.rounds, meet=world.collectives.barrier, warm_up=2)
    with StallWatch(mode, SECONDS):
        signs = mode.world.watch.signs
        operations = 2 + len(mode._buckets) * 2 if mode.mode == "sync" else 1

        def leave_signs() -> None:
            for _ in range(operations):
                signs.within(GRADIENTS, int)
            signs.stepped()

        times |= interleave({"signs of a step": timed(leave_signs, block)}, args.rounds)
    title = {"mode": mode.mode, "batch": args.batch, "ranks": world.size, "threads": 1}
    report.case(title, times, [Ratio("watched", "not watched", TARGET), Ratio("signs of a step", "not watched", 0.01)])


if __name__ == "__main__":
    main()
