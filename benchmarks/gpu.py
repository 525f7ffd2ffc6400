"""Where a training step's time goes with the model on a GPU, and what copies beside the computation save.

Every mode trains twice in turn, on the same batch: `staged` with pinned memory and a copy stream, as it is, and `blocking` with
copies into the same memory that hold the host until they are done. `torch` is the plain loop of one rank on the same GPU.
For each mode then the split of its staged step: compute, copy (the host waited for a copy), communicate, wait. Several ranks
share a GPU where there are more ranks than GPUs. With `--device cpu` nothing is copied: a smoke run for machines without one.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import Ratio, Report, begin, finish, interleave, launch, make_parser, wide_mlp
from torch import nn

MODES = ("async", "sync", "kstep", "hierarchical")
MODELS = ("lenet5", "mlp")
BATCH = 64


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cuda or cpu")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--collectives", nargs="+", default=["mpi", "window"], help="for modes sync and kstep")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    about = begin("gpu")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    about["gpus"] = names
    print(f"GPUs: {', '.join(names) or 'none'}", flush=True)
    rounds = str(args.rounds or (2 if args.quick else 20))
    models, ranks = (MODELS[:1], [2]) if args.quick else (args.models, args.ranks)
    options = ["--rounds", rounds, "--device", args.device, "--models", *models, "--modes", *args.modes]
    rows = [row for n in ranks for row in launch(n, [*options, "--collectives", *args.collectives])]
    finish(args, "gpu", about, rows)


def work(args) -> None:
    """One rank."""
    import hpcasync

    world = hpcasync.init(device=args.device, threads=1)
    report = Report(quiet=world.rank > 0)
    for model in args.models:
        for mode in args.modes:
            for backend in args.collectives if mode in ("sync", "kstep") else [""]:
                measure(world, report, model, mode, backend, args.rounds)
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


class BlockingCopies:
    """Copies that hold the host."""

    def to_host(self, host: torch.Tensor, source: torch.Tensor) -> BlockingCopies:
        host.copy_(source)
        return self

    def to_device(self, target: torch.Tensor, host: torch.Tensor) -> BlockingCopies:
        target.copy_(host)
        return self

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds(self) -> float:
        return 0.0


def make(mode: str, backend: str, model: nn.Module, world) -> Any:
    """The mode around a model, with momentum."""
    import hpcasync

    inner = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if mode == "sync":
        return hpcasync.Sync(inner, model=model, world=world, collectives=backend)
    if mode == "kstep":
        return hpcasync.KStep(inner, every=8, block_momentum=0.5, model=model, world=world, collectives=backend)
    rule = hpcasync.rules.TrendSmooth(base="momentum", lr=1e-3)
    if mode == "async":
        return hpcasync.Async(model, rule, world=world)
    return hpcasync.modes.Hierarchical(model, rule, every=8, delay=4, world=world, groups=world.size)


def measure(world, report: Report, name: str, mode: str, backend: str, rounds: int) -> None:
    """One model and mode, all sides in turn on all ranks."""
    from hpcasync.models import build
    from hpcasync.modes import staging

    torch.manual_seed(0)
    if name == "mlp":
        model, inputs, classes = wide_mlp()
        x = torch.randn(BATCH, inputs)
    else:
        model, classes, x = build(name, (1, 28, 28), 10), 10, torch.randn(BATCH, 1, 28, 28)
    model, x, y = model.to(world.device), x.to(world.device), torch.randint(classes, (BATCH,), device=world.device)
    plain = copy.deepcopy(model)
    works: dict[str, tuple[nn.Module, Any]] = {"torch": (plain, torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9))}
    real = staging.copies_of
    if staging.apart(world.device):
        staging.copies_of = lambda device: BlockingCopies()  # type: ignore[assignment]
        other = copy.deepcopy(model)
        works["blocking"] = other, make(mode, backend, other, world)
        staging.copies_of = real
    works["staged"] = model, make(mode, backend, model, world)
    block = 8 if name == "mlp" or rounds <= 2 else 24  # whole blocks of kstep
    sides = {side: step_of(*pair, x, y, block) for side, pair in works.items()}
    times = interleave(sides, rounds, meet=world.collectives.barrier, warm_up=2)
    times = {side: np.mean(world.gather(values), axis=0) for side, values in times.items()}
    mode_of = works["staged"][1]
    shares = world.gather(mode_of.share.shares())
    split = {k: float(np.mean([s.get(k, 0.0) for s in shares])) for k in ("compute", "copy", "communicate", "wait")}
    title = {"model": name, "mode": mode, **({"collectives": backend} if backend else {}), "ranks": world.size}
    title["device"] = world.device.type
    ratios = [Ratio("staged", "torch"), *([Ratio("staged", "blocking", 1.0)] if "blocking" in works else [])]
    report.case(title, times, ratios)
    report.rows[-1]["split"] = split
    if world.rank == 0:
        print("  split: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in split.items()), flush=True)
    for _, opt in works.values():
        if hasattr(opt, "close"):
            opt.close()


def step_of(module: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor, block: int) -> Callable[[], float]:
    """A side: seconds of one of ``block`` steps, with all the device's work done."""

    def side() -> float:
        began = time.perf_counter()
        for _ in range(block):
            opt.zero_grad()
            F.cross_entropy(module(x), y).backward()
            opt.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        seconds = (time.perf_counter() - began) / block
        if hasattr(opt, "share"):
            opt.share.stop()  # the next side's time is not its own
        return seconds

    return side


if __name__ == "__main__":
    main()
