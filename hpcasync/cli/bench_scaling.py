"""``hpcasync bench scaling``: strong and weak scaling of modes and rules; one launch measures one number of ranks."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError


def add(which: Any) -> None:
    """Add the command to those of ``bench``."""
    one = which.add_parser(
        "scaling",
        help="strong and weak scaling of modes and rules",
        description="Measure, on the ranks that mpiexec or srun started, the training throughput of modes and rules, and put it "
        "into a file of the folder --out; --table makes the table of all files there. One launch per number of ranks, the first "
        "with one rank: it measures the plain torch loop that efficiencies refer to.",
    )
    one.add_argument("--out", type=Path, default=Path("scaling"), metavar="DIR", help="where the files go (default: scaling)")
    one.add_argument("--table", action="store_true", help="measure nothing: table, CSV and picture of what is in --out")
    one.add_argument("--what", nargs="+", default=["sync", "kstep", "async:asgd", "async:trend-smooth"], metavar="MODE[:RULE]",
                     help="default: sync kstep async:asgd async:trend-smooth")  # fmt: skip
    one.add_argument("--kinds", nargs="+", default=["weak", "strong"], metavar="KIND", help="weak, strong (default: both)")
    one.add_argument("--data", default="digits", help="default: digits")
    one.add_argument("--model", default="mlp", help="default: mlp")
    one.add_argument("--batch", type=int, default=32, help="weak scaling: samples per step of a rank (default: 32)")
    one.add_argument("--global-batch", type=int, default=128, help="strong scaling: samples per step of all ranks (default: 128)")
    one.add_argument("--every", type=int, default=None, help="K of kstep and hierarchical")
    one.add_argument("--collectives", default=None, help="backend of sync, kstep and hierarchical (default: mpi)")
    one.add_argument("--threads", type=int, default=1, help="CPU threads per rank, the base's too (default: 1)")
    one.add_argument("--device", default="auto", help="default: auto")
    one.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: 2)")
    one.add_argument("--rounds", type=int, default=6, help="measurements of each case, in turn (default: 6)")
    one.add_argument("--slow", action="append", default=[], metavar="RANK:FACTOR", help="a straggler; repeatable")
    one.add_argument("--target", type=float, default=None, metavar="ACCURACY",
                     help="also train, weak cases only, and find the time to it")  # fmt: skip
    one.add_argument("--epochs", type=int, default=3, help="of those trainings, at most (default: 3)")
    one.add_argument("--lr", nargs="+", type=float, default=[], metavar="RATE",
                     help="learning rates of those trainings; each case's best counts (default: the rule's own)")  # fmt: skip
    one.add_argument("--seed", type=int, default=0, help="of the first round's trainings; each round's is one more (default: 0)")
    one.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and write a file, or make the table."""
    if args.table:
        from rich.console import Console
        from rich.markdown import Markdown

        from hpcasync.scaling.table import markdown, read_rows, tabulate, write_table

        lines = tabulate(read_rows(args.out))
        if sys.stdout.isatty():
            Console().print(Markdown(markdown(lines)))
        else:
            print(markdown(lines), end="")
        for path in write_table(lines, args.out):
            print(path)
        return 0
    _check(args)
    return _measure(args)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("global_batch", 1), ("rounds", 1), ("epochs", 1), ("threads", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(args, name)}: expected at least {least}")
    if not 0 < args.seconds < math.inf:
        raise UsageError(f"--seconds={args.seconds}: expected a finite number > 0")
    if args.every is not None and args.every < 1:
        raise UsageError(f"--every={args.every}: expected at least 1")
    from hpcasync.scaling.cases import BLOCK_TAKERS

    modes = {name.partition(":")[0] for name in args.what}
    for name, takers in BLOCK_TAKERS.items():
        if getattr(args, name) is not None and not modes & {*takers}:
            raise UsageError(f"--{name}: it is of {', '.join(sorted(takers))}; --what has none of them")
    if args.target is not None and not 0 < args.target <= 1:
        raise UsageError(f"--target={args.target}: expected an accuracy in (0, 1], such as 0.9")


def _measure(args: argparse.Namespace) -> int:
    import torch

    from hpcasync.comm import init, raise_together
    from hpcasync.data.atomic import check_writable, replacing
    from hpcasync.scaling.cases import BASE, make_cases, tried
    from hpcasync.scaling.measure import check, seconds_to, throughput
    from hpcasync.train.slow import parse_slow

    world = init(device=args.device, threads=args.threads)
    keys: dict[str, Any] = {name: getattr(args, name) for name in ("data", "model", "threads", "epochs", "device")}
    keys["checkpoint_every"] = 0
    path = args.out / f"ranks-{world.size}-nodes-{world.nodes}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
    problem, rows = None, []
    try:
        slow = parse_slow(args.slow, world.size, least=1)
        cases = make_cases(
            args.what, args.kinds, keys, batch=args.batch, global_batch=args.global_batch, ranks=world.size, nodes=world.nodes,
            block={k: v for k, v in (("every", args.every), ("collectives", args.collectives)) if v is not None},
        )  # fmt: skip
        for case in cases:
            tried(case.config, args.lr)
        if world.rank == 0:  # found out now, not after the measurement
            check_writable(path, needed=4096 + args.rounds * len(cases) * (512 + 32 * world.size))
    except UsageError as error:
        problem = str(error)
    except OSError as error:
        problem = f"can't write {path}: {error.strerror}; choose another --out"
    raise_together(world, problem)
    for case in cases:
        check(world, case)
    factor = slow[world.rank]
    settings = {k: v for k, v in vars(args).items() if k not in ("run", "bench", "command")}
    about = {"cores": len(os.sched_getaffinity(0)), "mpi": world.library, "torch": torch.__version__, "load": os.getloadavg()[0]}
    for turn in range(args.rounds):
        for case in cases:
            row: dict[str, Any] = {"kind": case.kind, "what": case.name, "ranks": world.size, "nodes": world.nodes}
            row |= {"batch": case.config.batch, **throughput(world, case, args.seconds, factor)}
            if args.target is not None and case.kind == "weak" and case.name != BASE:
                row["trainings"] = [
                    {"lr": config.options["lr"], **seconds_to(world, config, args.target, seed=args.seed + turn, factor=factor)}
                    for config in tried(case.config, args.lr)
                ]
            rows.append(row)
            if world.rank == 0:
                speed = f"{row['samples_per_second']:,.0f} samples/s"
                print(f"{turn + 1}/{args.rounds} {case.kind} {case.name}: {speed}", file=sys.stderr)
        if world.rank == 0:  # after each round: a launch that is ended loses one at most
            text = json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1, default=str)
            try:
                with replacing(path) as temporary:
                    temporary.write_text(text + "\n")
            except OSError as error:
                problem = f"can't write {path}: {error.strerror}; choose another --out"
        raise_together(world, problem)
    if world.rank == 0:
        print(path)
    return 0
