"""Writing a checkpoint: `save_checkpoint` of one rank against a plain write and fsync of as many bytes, and reading it back.

Perceptrons of 1 and 25 million parameters, `Async` with rule trend-smooth on adam (four more vectors of the model's size) and
`KStep` around SGD with momentum. The checkpoint's bytes are hashed (SHA-256) and synced with their folder; `hash` is that pass
alone, so `plain write + hash` is the limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Ratio, Report, begin, finish, interleave, launch, make_parser, timed, wide_mlp

SIZES = {"1 M": 512, "25 M": 4096}  # width of the perceptron


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    about = begin("checkpoint")
    rounds = args.rounds or (3 if args.quick else 9)
    more = ["--folder", str(args.folder)] if args.folder else []
    rows = launch(1, ["--rounds", str(rounds), *(["--quick"] if args.quick else []), *more])
    finish(args, "checkpoint", about, rows)


def work(args: Any) -> None:
    """The one rank."""
    import hpcasync
    from hpcasync.rules import make_rule

    world = hpcasync.init(device="cpu", threads=1)
    report = Report()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size, width in list(SIZES.items())[: 1 if args.quick else None]:
            model, inputs, _ = wide_mlp(width)
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            model(torch.ones(1, inputs)).sum().backward()
            with hpcasync.KStep(opt, model=model, world=world) as kstep:
                kstep.step()
                measure(report, Path(folder), {"parameters": size, "mode": "kstep, momentum"}, kstep, args.rounds)
            rule = make_rule("trend-smooth", {"base": "adam", "lr": 1e-3})
            with hpcasync.Async(model, rule, world=world) as asynchronous:
                model(torch.ones(1, inputs)).sum().backward()
                asynchronous.step()
                measure(report, Path(folder), {"parameters": size, "mode": "async, trend-smooth adam"}, asynchronous, args.rounds)
    args.worker.write_text(json.dumps(report.rows))


def measure(report: Report, folder: Path, title: dict[str, Any], mode: Any, rounds: int) -> None:
    """All sides in turn."""
    import hpcasync

    path = folder / "checkpoint.h5"
    hpcasync.save_checkpoint(path, mode)
    nbytes = path.stat().st_size
    content = np.frombuffer(os.urandom(1 << 20) * (1 + nbytes // (1 << 20)), np.uint8)[:nbytes]

    def plain() -> None:
        with (folder / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    sides = {
        "save_checkpoint": timed(lambda: hpcasync.save_checkpoint(path, mode)),
        "load_checkpoint": timed(lambda: hpcasync.load_checkpoint(path, mode)),
        "plain write": timed(plain),
        "hash": timed(lambda: hashlib.sha256(content).digest()),
    }
    times = interleave(sides, rounds)
    times["plain write + hash"] = times["plain write"] + times.pop("hash")
    ratios = [Ratio("save_checkpoint", other) for other in ("plain write + hash", "plain write")]
    report.case({**title, "MB": round(nbytes / 1e6, 1)}, times, ratios, dict.fromkeys(times, nbytes))


if __name__ == "__main__":
    main()
