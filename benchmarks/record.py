"""What `hpcasync train --record` costs a step: the training loop itself, recorded and not, in blocks in turn.

LeNet-5 on batches of 28 x 28 samples, one thread per rank, the same model and window for both sides. `calls of the
record` is what a step calls for it, alone: with warm caches.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import Ratio, Report, begin, finish, interleave, launch, make_parser, timed
from _loop import folder_of, make_run, steps_of

TARGET = 1.02


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["lenet5"], help="built-in models (default: lenet5)")
    parser.add_argument("--batch", type=int, default=32, help="samples per step and rank (default: 32)")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 100)
    if args.worker:
        work(args)
        return
    about = begin("record")
    options = ["--rounds", str(args.rounds), "--batch", str(args.batch), "--models", *args.models]
    options += ["--quick"] if args.quick else []
    rows = [row for ranks in args.ranks for row in launch(ranks, options)]
    finish(args, "record", about, rows)


def work(args) -> None:
    """One rank."""
    import hpcasync

    world = hpcasync.init(threads=1)
    report = Report(quiet=world.rank > 0)
    with folder_of(world) as (where, data):
        for model in args.models:
            measure(args, world, report, model, where, data)
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def measure(args, world, report: Report, model: str, where: Path, data: str) -> None:
    """One model: steps of the two runs in turn."""
    from hpcasync.train.keeper import Keeper

    block = 3 if args.quick else 20
    run = make_run(world, model, data, args.batch)
    run.begin_record(where / model, Keeper(run, None))
    record = run.record
    both = (("record", record), ("no record", None))
    sides: dict[str, Any] = {name: steps_of(run, block, partial(use, run, on)) for name, on in both}
    for side in sides.values():
        side()
    sides["calls of the record"] = timed(calls_of(record), block)
    times = interleave(sides, args.rounds, meet=world.collectives.barrier, warm_up=2)
    title = {"model": model, "batch": args.batch, "ranks": world.size, "threads": world.threads, "measured": "train loop"}
    report.case(title, times, [Ratio("record", "no record", TARGET), Ratio("calls of the record", "no record", 0.02)])
    run.mode.close()
    record.close()


def use(run, record) -> None:
    """Go on with the record, or with None."""
    run.record = run.mode.recorder = record


def calls_of(record):
    """What a step of a recorded run calls, without the step."""
    from hpcasync.modes.recorder import Event

    mode = record._run.mode
    taken = np.arange(record._run.batches.batch)
    grads = [np.zeros(1, np.float32)] * len(mode.params)
    hypers = mode._hypers()

    def step() -> None:
        record.step_begins(taken)
        record.pushing(grads, hypers, 0)
        record.event(Event.PUSH, time.perf_counter(), 0.0)
        record.step_ends(1.0)

    return step


if __name__ == "__main__":
    main()
