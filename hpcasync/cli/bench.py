"""``hpcasync bench``: micro-benchmarks of what the machine gives, in the format of the OSU suite, and scaling."""

from __future__ import annotations

import argparse
from typing import Any

from hpcasync.cli import bench_scaling
from hpcasync.errors import UsageError


def add(commands: Any) -> None:
    """Add the command group to the parser."""
    text = "benchmarks: allreduce, rma, scaling"
    parser = commands.add_parser("bench", help=text, description="Start it under mpiexec or srun.")
    which = parser.add_subparsers(dest="bench", required=True, metavar="WHAT", parser_class=type(parser))
    bench_scaling.add(which)
    for name, text, call in (
        ("allreduce", "latency and bandwidth of an allreduce by message size", _allreduce),
        ("rma", "latency and bandwidth of put, get, fetch-and-op by message size, through an MPI window", _rma),
    ):
        one = which.add_parser(name, help=text, description=f"OSU format: {text}. Medians over the rounds, of the slowest rank.")
        one.add_argument("--sizes", nargs="+", default=None, metavar="SIZE", help="such as 4 64K 16M (default: 4 to 64M)")
        one.add_argument("--rounds", type=int, default=20, help="timed rounds per size (default: 20)")
        one.set_defaults(run=call)
        if name == "allreduce":
            one.add_argument("--collectives", default="mpi", help="backend (default: mpi)")


def parse_size(text: str) -> int:
    """Bytes from ``64``, ``4K``, ``16M`` or ``1G`` (powers of 1024)."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--sizes {text}: expected bytes such as 64, 4K or 16M")
    return int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]


def _sizes(args: argparse.Namespace) -> list[int]:
    if args.rounds < 1:
        raise UsageError(f"--rounds={args.rounds}: expected at least 1")
    return [parse_size(text) for text in args.sizes] if args.sizes else [4 << 2 * i for i in range(13)]


def _allreduce(args: argparse.Namespace) -> int:
    from hpcasync.comm import check_backend, init, osu

    sizes = _sizes(args)
    check_backend(args.collectives)
    osu.allreduce(init(device="cpu"), args.collectives, sizes, args.rounds)
    return 0


def _rma(args: argparse.Namespace) -> int:
    from hpcasync.comm import init, osu

    osu.rma(init(device="cpu"), _sizes(args), args.rounds)
    return 0
