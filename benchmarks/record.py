"""What `hpcasync train --record` costs a step: the training loop itself, recorded and not, in blocks in turn.

LeNet-5 on batches of 28 x 28 samples, one thread per rank, the same model and window for both sides. `calls of the
record` is what a step calls for it, alone: with warm caches.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import Ratio, Report, begin, finish, interleave, launch, make_parser, timed

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
    with tempfile.TemporaryDirectory() as folder:
        where = Path(world.gather(folder)[0])
        data = where / "data.h5"
        if world.rank == 0:
            write_data(data)
        world.collectives.barrier()
        for model in args.models:
            measure(args, world, report, model, where, str(data))
        world.collectives.barrier()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def write_data(path: Path) -> None:
    """Random samples: only their shape matters here."""
    from hpcasync.data.layout import Arrays
    from hpcasync.data.write import write_dataset

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12_000, 1, 28, 28), np.uint8), np.arange(12_000) % 10
    write_dataset(path, Arrays(x[:10_000], y[:10_000], x[10_000:], y[10_000:]))


def measure(args, world, report: Report, model: str, where: Path, data: str) -> None:
    """One model: steps of the two runs in turn."""
    block = 3 if args.quick else 20
    run = make_run(world, model, data, args.batch, where / model)
    record = run.record
    sides: dict[str, Any] = {name: steps_of(run, on, block) for name, on in (("record", record), ("no record", None))}
    for side in sides.values():
        side()
    sides["calls of the record"] = timed(calls_of(record), block)
    times = interleave(sides, args.rounds, meet=world.collectives.barrier, warm_up=2)
    title = {"model": model, "batch": args.batch, "ranks": world.size, "threads": world.threads, "measured": "train loop"}
    report.case(title, times, [Ratio("record", "no record", TARGET), Ratio("calls of the record", "no record", 0.02)])
    run.mode.close()
    record.close()


def make_run(world, model: str, data: str, batch: int, folder: Path):
    """A run as `hpcasync train` makes it, about to make its first step."""
    from hpcasync.train import loop
    from hpcasync.train.config import make_config
    from hpcasync.train.keeper import Keeper
    from hpcasync.train.progress import Progress

    keys = {"data": data, "model": model, "batch": batch, "epochs": 1000, "threads": 1}
    config = make_config(keys)
    dataset, batches, net = loop.prepare(config, world)
    mode = loop.make_mode(config, net, world)
    run = loop.Run(config, world, dataset, batches, net, mode, Progress(1, 1, shown=False), None, None)
    run.begin_record(folder, Keeper(run, None))
    return run


def steps_of(run, record, block: int):
    """A side: so many steps of the loop, with the record or None."""

    class Stopper:
        """In place of the keeper of checkpoints: leaves the epoch after a block."""

        left = 0

        def after_step(self) -> bool:
            self.left -= 1
            return self.left == 0

    stopper = Stopper()

    def side() -> float:
        run.step, stopper.left = 0, block
        run.record = run.mode.recorder = record
        began = time.perf_counter()
        run._epoch(stopper)
        return (time.perf_counter() - began) / block

    return side


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
