"""``hpcasync train``: one training run, on as many ranks as mpiexec or srun started."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from hpcasync.train.config import OPTIONS, Option, TrainConfig, make_config, read_config, rule_options


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model. Start it under mpiexec or srun for several ranks; alone it is one rank.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="TOML file with keys named like the flags; flags win")
    parser.add_argument("--json", action="store_true", default=False, help="print the result as one JSON object, last")
    general = parser.add_argument_group("run")
    for option in OPTIONS:
        add_flag(general, option)
    rule = parser.add_argument_group("rule (defaults are the rule's own)")
    for option in rule_options():
        add_flag(rule, option)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, then show the table, and the JSON line if asked."""
    config = config_of(args)

    from hpcasync.comm import init
    from hpcasync.train import signals
    from hpcasync.train.loop import train
    from hpcasync.train.records import to_json
    from hpcasync.train.table import console, ranks_table, runs_table

    outcome = train(config)
    if outcome.stopped:
        if init().rank == 0:
            print(
                f"hpcasync: stopped by {outcome.stopped}; checkpoint {outcome.result['checkpoint']}. Go on with "
                f"--resume auto --output {outcome.folder}",
                file=sys.stderr,
                flush=True,
            )
            if args.json:
                print(to_json(outcome.result), flush=True)
        return signals.EXIT_CODE
    if init().rank == 0:
        out = console()
        out.print(runs_table([(config.name, outcome.result)]))
        out.print(ranks_table(outcome.ranks))
        for death in outcome.result.get("deaths", []):
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(death["time"]))
            out.print(f"rank {death['rank']} died at {at}: {death.get('cause', 'the others went on')}", soft_wrap=True)
        out.print(f"records: {outcome.folder}", soft_wrap=True)
        if args.json:
            print(to_json(outcome.result), flush=True)
    return 0


def config_of(args: argparse.Namespace, workers: Callable[[], int] | None = None) -> TrainConfig:
    """The configuration that parsed arguments ask for; ``workers`` as in `make_config`.

    Raises:
        UsageError: as `make_config` and `read_config`.
    """
    flags = {k: v for k, v in vars(args).items() if k not in ("command", "run", "config", "json")}
    return make_config(read_config(args.config) if args.config else {}, flags, workers=workers)


def add_flag(group: Any, option: Option) -> None:
    """Add the flag of one option."""
    flag = "--" + option.name.replace("_", "-")
    text = option.help
    if option.default not in (None, ()) and option.kind is not bool:
        text += f" (default: {option.default})"
    if option.modes:
        text += f" [mode {', '.join(option.modes)}]"
    text = text.replace("%", "%%")
    if option.kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, dest=option.name)
    elif option.kind == "list":
        group.add_argument(flag, action="append", help=text.split(": ", 1)[1], metavar=text.split(": ")[0], dest=option.name)
    elif option.kind == "floats":
        group.add_argument(flag, nargs=2, type=float, metavar=("B1", "B2"), help=text, dest=option.name)
    else:
        kind = {"number-or-word": _number_or_word, "whole-or-schedule": str}.get(option.kind, option.kind)
        group.add_argument(flag, type=kind, help=text, dest=option.name, metavar=option.name.upper())


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
