"""``hpcasync list``: what there is, in one line each with its paper; the options of one of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from typing import Any

from hpcasync.docstrings import attributes_of, first_line, section, source_of
from hpcasync.errors import unknown


@dataclass(frozen=True)
class Entry:
    """One thing that can be chosen by its name.

    Attributes:
        kind: rule, mode, preset, model or data set.
        name: as users write it.
        line: what it is.
        paper: where it comes from, empty if nowhere in particular.
        options: per option its default and its meaning.
        notes: more about it.
    """

    kind: str
    name: str
    line: str
    paper: str = ""
    options: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: str = ""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("list", help="rules, modes, presets, models and data sets; the options of one")
    parser.add_argument("name", nargs="?", help="show the options of this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print all entries, or one with its options."""
    entries = catalogue()
    if args.name is not None:
        wanted = args.name.strip().lower().replace("_", "-")
        found = [e for e in entries if e.name.lower() == wanted]
        if not found:
            raise unknown("name", args.name, {e.name for e in entries})
        entries = found
    if args.json:
        print(json.dumps([dataclasses.asdict(e) for e in entries], default=str))
    elif args.name is None:
        _print_all(entries)
    else:
        for entry in entries:
            _print_one(entry)
    return 0


def catalogue() -> list[Entry]:
    """Everything that has a name, from the registries and docstrings."""
    return [*_rules(), *_modes(), *_presets(), *_models(), *_data_sets()]


def _rules() -> list[Entry]:
    from hpcasync.rules import RULES

    entries = []
    for name, rule in RULES.items():
        texts = attributes_of(rule)
        options = {f.name: (f.default, texts.get(f.name, "")) for f in dataclasses.fields(rule)}
        line = first_line(rule) + ("" if rule.name == name else f"; the same as {rule.name}")
        entries.append(Entry("rule", name, line, rule.paper, options, source_of(rule)))
    return entries


def _modes() -> list[Entry]:
    from hpcasync.modes import MODES, Guided

    entries = []
    for name, mode in {**MODES, "guided": Guided}.items():  # guided is a flag of the two modes that it wraps
        parameters = inspect.signature(mode).parameters
        options = {
            n: (parameters[n].default, text)
            for n, text in section(mode, "Args").items()
            if n in parameters and parameters[n].default is not inspect.Parameter.empty
        }
        entries.append(Entry("mode", name, first_line(mode), source_of(mode).split(" (")[0], options, source_of(mode)))
    return entries


def _presets() -> list[Entry]:
    from hpcasync.modes import KStep
    from hpcasync.modes.presets import PRESETS

    texts = section(KStep, "Args")
    return [
        Entry("preset", name, p.line, p.paper, {n: (v, texts.get(n, "")) for n, v in p.options.items()})
        for name, p in PRESETS.items()
    ]


def _models() -> list[Entry]:
    from hpcasync.models.build import MODELS

    return [Entry("model", name, first_line(model), source_of(model)) for name, model in MODELS.items()]


def _data_sets() -> list[Entry]:
    from hpcasync.data import open_dataset
    from hpcasync.data.public import EMBEDDED, PUBLIC

    entries = []
    for name in EMBEDDED:
        data = open_dataset(name)
        line = f"{len(data.array('train/y')):,} samples of {data.shape}, {data.classes} classes; comes with the package"
        entries.append(Entry("data set", name, line, data.header.source))
    return entries + [
        Entry("data set", name, f"public; hpcasync data fetch {name}", public.source) for name, public in PUBLIC.items()
    ]


def _print_all(entries: list[Entry]) -> None:
    from rich.table import Table

    from hpcasync.train.table import console

    out = console()
    for kind in dict.fromkeys(e.kind for e in entries):
        table = Table(title=f"{kind}s", title_justify="left", title_style="bold", expand=True)
        table.add_column("name", no_wrap=True)
        table.add_column("what it is", ratio=3)
        table.add_column("paper", ratio=2, overflow="fold")
        for entry in (e for e in entries if e.kind == kind):
            table.add_row(entry.name, entry.line, entry.paper)
        out.print(table)
    out.print("The options of one: hpcasync list NAME", highlight=False)


def _print_one(entry: Entry) -> None:
    from rich.table import Table

    from hpcasync.train.table import console

    out = console()
    out.print(f"{entry.kind} {entry.name}: {entry.line}.", highlight=False, markup=False)
    sources = [entry.notes] if entry.notes.startswith(entry.paper) else [entry.paper, entry.notes]
    for words in filter(None, sources):
        out.print(f"Source: {words}.", highlight=False, markup=False)
    if not entry.options:
        return
    table = Table(expand=True)
    table.add_column("option", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", ratio=1)
    for name, (default, text) in entry.options.items():
        table.add_row(name, str(default), text)
    out.print(table)
