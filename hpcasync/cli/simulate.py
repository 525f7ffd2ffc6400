"""``hpcasync simulate``: many virtual workers in one process, under a virtual clock, without MPI."""

from __future__ import annotations

import argparse
from typing import Any

from hpcasync.cli.train import add_flag
from hpcasync.train.config import read_config, rule_options


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from hpcasync.simulate.config import MODES, SIMULATE_OPTIONS, simulate_options

    parser = commands.add_parser(
        "simulate",
        help="simulate training on many workers, without MPI",
        description="Train with virtual workers: real gradients and the same rules, under a virtual clock. One process; "
        f"the same bits for a seed. Modes: {', '.join(MODES)}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="TOML file with keys named like the flags; flags win")
    parser.add_argument("--json", action="store_true", default=False, help="print the result as one JSON object, last")
    machine = parser.add_argument_group("virtual machine")
    own = {o.name for o in SIMULATE_OPTIONS}
    general = parser.add_argument_group("run")
    for option in simulate_options():
        add_flag(machine if option.name in own else general, option)
    rule = parser.add_argument_group("rule (defaults are the rule's own)")
    for option in rule_options():
        add_flag(rule, option)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate, then show the table, and the JSON line if asked."""
    from hpcasync.simulate.config import make_simulate_config

    flags = {k: v for k, v in vars(args).items() if k not in ("command", "run", "config", "json")}
    config = make_simulate_config(read_config(args.config) if args.config else {}, flags)

    from hpcasync.train.records import to_json
    from hpcasync.train.table import console, ranks_table, runs_table

    out = console()
    if config.dry:
        from hpcasync.simulate.dry import dry_run, dry_table

        result = dry_run(config)
        out.print(dry_table(result))
    else:
        from hpcasync.simulate.run import simulate

        outcome = simulate(config)
        result = outcome.result
        out.print(runs_table([(config.name, result)]))
        out.print(ranks_table(outcome.ranks[:32], title=_title(len(outcome.ranks))))
        seconds, wall = result["virtual_seconds"], result["wall_seconds"]
        out.print(f"{seconds:,.4g} virtual seconds of {config.workers} workers, simulated in {wall:,.1f} s")
        out.print(f"records: {outcome.folder}", soft_wrap=True)
    if args.json:
        print(to_json(result), flush=True)
    return 0


def _title(workers: int) -> str:
    return "Virtual workers" if workers <= 32 else f"The first 32 of {workers} virtual workers"
