"""``hpcasync data``: import, fetch and describe data sets."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from hpcasync.errors import UsageError


def add(commands: Any) -> None:
    """Add the command and its sub-commands to the parser."""
    parser = commands.add_parser("data", help="import, fetch and describe data sets")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))

    importer = actions.add_parser("import", help="make an HDF5 data set from idx, CIFAR batches, CSV or npz files")
    importer.add_argument("source", help="folder or file to read")
    importer.add_argument("--out", required=True, metavar="FILE", help="HDF5 file to write")
    importer.add_argument("--kind", default="auto", help="idx, cifar, csv, npz (default: auto)")
    importer.add_argument("--name", help="name to store (default: of the source)")
    importer.add_argument("--classes", type=int, help="number of classes (default: largest label + 1)")
    importer.add_argument("--label", help="CSV: name or index of the label column (default: the last)")
    importer.add_argument("--header", action=argparse.BooleanOptionalAction, help="CSV: the first line has names")
    importer.add_argument("--test-fraction", type=float, help="CSV, npz without a test part: share for the test split")
    importer.add_argument("--seed", type=int, help="of that split")
    importer.add_argument("--overwrite", action="store_true", help="replace an existing file")
    importer.set_defaults(run=_import)

    fetcher = actions.add_parser("fetch", help="download a public data set, check it and import it into the cache")
    fetcher.add_argument("name", help="mnist, fashion-mnist, cifar-10 or cifar-100")
    fetcher.add_argument("--mirror", metavar="URL", help="address of a folder with the same files")
    fetcher.add_argument("--cache", metavar="DIR", help="where to keep it (default: the user's cache)")
    fetcher.set_defaults(run=_fetch)

    informer = actions.add_parser("info", help="what a data set holds")
    informer.add_argument("source", help="name or path")
    informer.add_argument("--json", action="store_true", help="print one JSON object")
    specs = "iid, shards:C, dirichlet:A, natural or file:PATH"
    informer.add_argument("--partition", metavar="SPEC", help=f"deal the training samples to workers: {specs}")
    informer.add_argument("--workers", type=int, default=10, help="to so many workers (default: 10)")
    informer.add_argument("--seed", type=int, default=0, help="of the partition (default: 0)")
    informer.add_argument("--plot", metavar="FILE", help="draw the classes of every worker, as PNG, PDF or SVG")
    informer.add_argument("--save", metavar="FILE", help="write the partition as HDF5, for --partition file:FILE")
    informer.set_defaults(run=_info)


def _import(args: argparse.Namespace) -> int:
    from hpcasync.data import import_dataset

    names = ("kind", "name", "classes", "overwrite", "label", "header", "test_fraction", "seed")
    print(import_dataset(args.source, args.out, **{n: getattr(args, n) for n in names}))
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from hpcasync.data import fetch

    print(fetch(args.name, mirror=args.mirror, cache=args.cache, progress=_Bar() if sys.stderr.isatty() else None))
    return 0


def _info(args: argparse.Namespace) -> int:
    from hpcasync.data import info

    facts = info(args.source)
    if args.partition:
        facts["partition"] = _partition(args)
    elif args.plot or args.save:
        raise UsageError(f"--{'plot' if args.plot else 'save'} needs a partition; add one, such as --partition shards:2")
    if args.json:
        print(json.dumps(facts))
        return 0
    from rich.table import Table

    from hpcasync.train.table import console

    table = Table(title=facts["name"], show_header=False)
    for split, part in facts["splits"].items():
        table.add_row(split, f"{part['samples']:,} samples, {part['dtype']} {part['shape'][1:]}")
        table.add_row("", "per class: " + " ".join(map(str, part["class_counts"])))
    for key in ("path", "classes", "class_names", "source", "checksum", "bytes"):
        table.add_row(key.replace("_", " "), str(facts[key]))
    if args.partition:
        for worker, counts in enumerate(facts["partition"]["class_counts"]):
            text = f"{sum(counts):,} samples; per class: " + " ".join(map(str, counts))
            table.add_row("" if worker else f"{args.partition}", f"worker {worker}: {text}")
    for key in ("plot", "save"):
        if getattr(args, key):
            table.add_row("written", str(getattr(args, key)))
    console().print(table)
    return 0


def _partition(args: argparse.Namespace) -> dict[str, Any]:
    """Make the partition, draw and save it where asked, and return its class counts."""
    from hpcasync.data import make_partition, open_dataset, save_partition
    from hpcasync.data.partition_plot import class_counts, plot_partition

    dataset = open_dataset(args.source)
    labels = dataset.array("train/y")
    parts = make_partition(args.partition, dataset, args.workers, args.seed)
    counts = class_counts(parts, labels, dataset.classes)
    if args.save:
        save_partition(args.save, parts, len(labels), checksum=dataset.header.checksum, spec=args.partition)
    if args.plot:
        title = f"{dataset.name}, {args.partition}, {args.workers} workers"
        plot_partition(counts, args.plot, names=dataset.header.class_names, title=title)
    return {"spec": args.partition, "workers": args.workers, "seed": args.seed, "class_counts": counts.tolist()}


class _Bar:
    """A download bar for pooch: sets ``total``, calls ``update``, ``reset`` and ``close``."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress

        self._bar = Progress(*Progress.get_default_columns(), DownloadColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task("download", total=None)
        self._bar.start()

    @property
    def total(self) -> float | None:
        return self._bar.tasks[0].total

    @total.setter
    def total(self, value: float) -> None:
        self._bar.update(self._task, total=value)

    def update(self, count: int) -> None:
        self._bar.update(self._task, advance=count)

    def reset(self) -> None:
        self._bar.reset(self._task)

    def close(self) -> None:
        self._bar.stop()
