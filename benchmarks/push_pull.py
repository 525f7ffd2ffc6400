"""Fused push+pull of the store against the bare kernel on private memory and against np.copyto.

One rank: `Store.push_pull` through the shared window (and through the private store that one rank really
uses, where the model lies in the store) against `rule.update` over the same elements in one call. Two ranks:
both push to one window at the same time, against both running the bare kernel on private memory. Times are
per update of all ranks together: 1 / sum over ranks of (1 / seconds).
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable

import numpy as np
from _common import Ratio, Report, begin, copy_of, finish, interleave, launch, make_parser, timed

RULES = {
    "asgd": ("asgd", {}),
    "trend-smooth": ("trend-smooth", {}),
    "adam": ("asgd", {"base": "adam"}),
}
SIZES = (1_000_000, 25_000_000, 100_000_000)
BLOCK_SECONDS = 0.05  # a timed block is at least so long


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", help="parameters (default 1e6 25e6 100e6)")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    args.sizes = [int(n) for n in args.sizes or (SIZES[:1] if args.quick else SIZES)]
    args.rounds = args.rounds or (3 if args.quick else 15)
    if args.worker:
        work(args)
        return
    about = begin("push_pull")
    options = ["--rounds", str(args.rounds), "--rules", *args.rules, "--sizes", *map(str, args.sizes)]
    rows = [row for ranks in args.ranks for row in launch(ranks, options)]
    finish(args, "push_pull", about, rows)


def work(args) -> None:
    """One rank."""
    import hpcasync

    world = hpcasync.init(threads=1)
    report = Report(quiet=world.rank > 0)
    for size in args.sizes:
        for rule in args.rules:
            measure(world, report, rule, size, args.rounds)
            gc.collect()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def measure(world, report: Report, name: str, size: int, rounds: int) -> None:
    """One case: all sides in turn, on all ranks."""
    from hpcasync.rules import make_rule
    from hpcasync.store import LocalStore, WindowStore, aligned_zeros, make_layout

    rule = make_rule(*RULES[name])
    layout = make_layout([size])
    hyper = rule.hyper(rule.group_options())
    vectors = len(rule.vectors)
    grad = np.random.default_rng(world.rank).standard_normal(size, np.float32)
    grad *= np.float32(1e-3)
    out = np.zeros(layout.total, np.float32)
    private = aligned_zeros(1 + vectors, layout.total)
    private[:] = 0
    # Read the gradient, read and write w and the vectors, write the copy.
    nbytes = 4 * size * (1 + 2 * (1 + vectors) + 1)
    copy, scale = copy_of(nbytes)
    count = 0

    def bare() -> None:
        nonlocal count
        count += 1
        rule.update(private, 0, grad, out[:size], hyper, count, 0)

    window = WindowStore(world, layout, rule)
    worker = window.worker(world.rank)
    works: dict[str, Callable[[], None]] = {
        "bare kernel": bare,
        "push_pull": lambda: window.push_pull(worker, [grad], out, [hyper]),
        "copy of the same bytes": copy,
    }
    if world.size == 1:
        local = LocalStore(layout, rule)
        alone = local.worker(0)
        works["push_pull, model in the store"] = lambda: local.push_pull(
            alone, [grad], local.state[0], [hyper]
        )
    if world.rank == 0:
        window.start_state(out)
    window.barrier()
    sides = {}
    for side, do in works.items():
        do()
        mine = timed(do)()
        sides[side] = timed(do, max(1, math.ceil(BLOCK_SECONDS / max(world.gather(mine)))))
    mine = interleave(sides, rounds, meet=window.barrier)
    times = {side: 1 / sum(1 / t for t in world.gather(values)) for side, values in mine.items()}
    times["copy of the same bytes"] *= scale
    ratios = [
        Ratio("push_pull", "bare kernel", 1.15 if world.size == 1 else 1.3),
        Ratio("bare kernel", "copy of the same bytes", 1.3 if world.size == 1 else None),
        Ratio("push_pull", "copy of the same bytes"),
    ]
    if world.size == 1:
        ratios.append(Ratio("push_pull, model in the store", "bare kernel", 1.15))
    moved = dict.fromkeys(works, nbytes) | {"push_pull, model in the store": nbytes - 4 * size}
    report.case({"rule": name, "parameters": size, "ranks": world.size}, times, ratios, moved)
    window.close()


if __name__ == "__main__":
    main()
