"""What `hpcasync train --live` and `--tensorboard` cost a step: the training loop itself, with and without, in blocks in turn.

LeNet-5 on batches of 28 x 28 samples, one thread per rank, the same model and window for all sides. The view is drawn on a
pseudo-terminal that a process reads and drops; the process that draws is stopped while the other sides run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial

from _common import Ratio, Report, begin, finish, interleave, launch, make_parser
from _loop import folder_of, make_run, steps_of

TARGET = 1.01


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="samples per step and rank (default: 32)")
    parser.add_argument("--block", type=int, default=300, help="steps per block: several of the half seconds between two rows")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 30)
    if args.worker:
        work(args)
        return
    about = begin("live")
    options = ["--rounds", str(args.rounds), "--batch", str(args.batch), "--block", str(10 if args.quick else args.block)]
    rows = [row for ranks in args.ranks for row in launch(ranks, options)]
    finish(args, "live", about, rows)


def work(args) -> None:
    """One rank."""
    import hpcasync
    from hpcasync.train.progress import Progress

    world = hpcasync.init(threads=1)
    report = Report(quiet=world.rank > 0)
    with folder_of(world) as (where, data):
        run = make_run(world, "lenet5", data, args.batch)
        live = live_monitor(run.mode)
        curves = hpcasync.Monitor(run.mode, tensorboard=where / "tensorboard")
        sides = {}
        for name, monitor in (("live", live), ("tensorboard", curves), ("neither", None)):
            progress = Progress(1000, 1, shown=False, monitor=monitor)
            sides[name] = steps_of(run, args.block, partial(use, run, progress, live, monitor is live))
        times = interleave(sides, args.rounds, meet=world.collectives.barrier)
        title = {"model": "lenet5", "batch": args.batch, "ranks": world.size, "threads": world.threads, "measured": "train loop"}
        report.case(title, times, [Ratio(name, "neither", TARGET) for name in ("live", "tensorboard")])
        draw(live, True)
        live.close()
        curves.close()
        run.mode.close()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def live_monitor(mode):
    """A monitor with a live view on a terminal whose reader drops all."""
    import hpcasync

    master, slave = os.openpty()
    subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ["TERM"] = "xterm-256color"
    before, sys.stderr = sys.stderr, os.fdopen(slave, "w")
    try:
        monitor = hpcasync.Monitor(mode, live=True, title="benchmark", steps=1_000_000)
    finally:
        sys.stderr = before
    os.close(master)
    assert monitor.shown
    return monitor


def use(run, progress, live, on: bool) -> None:
    """Go on with these; the screen is drawn or not."""
    run.progress = progress
    draw(live, on)


def draw(live, on: bool) -> None:
    """Let the process that draws go on, or stop it."""
    if live._screen is not None:
        live._screen.send_signal(signal.SIGCONT if on else signal.SIGSTOP)


if __name__ == "__main__":
    main()
