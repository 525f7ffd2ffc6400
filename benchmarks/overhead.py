"""A training step of `Async` at one rank against the plain torch loop with the same optimizer.

Both sides train their own copy of the same model on the same batch, in short blocks in turn, with the same
number of torch threads. Small model (LeNet-5): the whole step, where overhead per step counts. Large model
(25 M): the optimizer's `step()` alone, where the memory traffic counts. `step log` is what the record of the steps'
seconds in `run.h5` costs a step of `hpcasync train`.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from _common import Ratio, Report, begin, copy_of, finish, interleave, make_parser, timed, wide_mlp
from torch import nn

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-4),
}
LR = {"sgd": 1e-3, "momentum": 1e-3, "adam": 1e-4}
BATCH = 64


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="threads of both sides (default: the cores)")
    parser.add_argument("--models", nargs="+", choices=["lenet5", "large", "log"], default=["lenet5", "large", "log"])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    args = parser.parse_args()
    import hpcasync

    about = begin("overhead")
    world = hpcasync.init(device="cpu", threads=args.threads)
    if world.size > 1:
        raise SystemExit("overhead measures one rank: start it without mpiexec")
    about["threads"] = world.threads
    report = Report()
    for model in args.models:
        if model == "log":
            log(world, report, args.rounds or (5 if args.quick else 60), 5 if args.quick else 100)
            continue
        for base in args.bases:
            torch.manual_seed(0)
            if model == "lenet5":
                small(world, report, base, args.rounds or (5 if args.quick else 60), 5 if args.quick else 20)
            else:
                width = 512 if args.quick else 4096
                large(world, report, base, width, args.rounds or (3 if args.quick else 25))
    finish(args, "overhead", about, report.rows)


def pair(model: nn.Module, base: str, world) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """The same model twice: under torch's optimizer, and under Async with the rule that does the same."""
    import hpcasync

    twin = copy.deepcopy(model)
    rule = hpcasync.rules.ASGD(base=base, lr=LR[base])
    return {
        "torch": (model, BASES[base](model.parameters())),
        "Async": (twin, hpcasync.Async(twin, rule, world=world)),
    }


def small(world, report: Report, base: str, rounds: int, block: int) -> None:
    """LeNet-5, whole steps, in blocks of ``block`` steps."""
    from hpcasync.models import build

    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    sides = {}
    both = pair(build("lenet5", (1, 28, 28), 10), base, world)
    for name, (model, opt) in both.items():

        def step(model=model, opt=opt) -> None:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

        sides[name] = timed(step, block)
    times = interleave(sides, rounds, warm_up=2)
    title = {"model": "lenet5", "optimizer": base, "threads": world.threads, "measured": "whole step"}
    report.case(title, times, [Ratio("Async", "torch", 1.05)])
    both["Async"][1].close()


def log(world, report: Report, rounds: int, block: int) -> None:
    """What `StepLog` adds to a step: the smallest job, the default one, and LeNet-5."""
    import hpcasync
    from hpcasync.models import build
    from hpcasync.train.step_log import StepLog

    for name, shape, batch in (("logistic", (1, 8, 8), 16), ("mlp", (1, 8, 8), 32), ("lenet5", (1, 28, 28), 32)):
        x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
        model = build(name, shape, 10)
        opt = hpcasync.Async(model, hpcasync.rules.ASGD(), world=world)
        opt.share.start()
        steps = StepLog(opt.share)

        def step(model=model, opt=opt, x=x, y=y) -> None:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

        times = interleave({"Async": timed(step, block), "step log": timed(steps.step, block)}, rounds, warm_up=2)
        title = {"model": name, "pixels": shape[1] * shape[2], "batch": batch, "threads": world.threads}
        report.case(title | {"measured": "step log"}, times, [Ratio("step log", "Async", 0.01)])
        opt.close()


def large(world, report: Report, base: str, width: int, rounds: int) -> None:
    """A perceptron, 25 M parameters at width 4096: the optimizer's and the whole step, one by one in turn."""
    model, inputs, classes = wide_mlp(width)
    both = pair(model, base, world)
    x, y = torch.randn(BATCH, inputs), torch.randint(classes, (BATCH,))
    whole: dict[str, list[float]] = {name: [] for name in both}
    sides = {}
    for name, (model, opt) in both.items():

        def step(name=name, model=model, opt=opt) -> float:
            began = time.perf_counter()
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            middle = time.perf_counter()
            opt.step()
            end = time.perf_counter()
            whole[name].append(end - began)
            return end - middle

        sides[name] = step
    # One rank keeps the model in the store: read the gradient, read and write w and the vectors.
    opt = both["Async"][1]
    count = sum(p.numel() for p in opt.params)
    nbytes = 4 * count * (1 + 2 * (1 + len(opt.rule.vectors)))
    work, scale = copy_of(nbytes)
    sides["copy of the same bytes"] = timed(work)
    times = interleave(sides, rounds, warm_up=3)
    times["copy of the same bytes"] *= scale
    title = {"model": f"mlp of {count / 1e6:.1f} M", "optimizer": base, "threads": world.threads}
    ratios = [Ratio("Async", "torch", 1.0), Ratio("Async", "copy of the same bytes")]
    moved = dict.fromkeys(times, nbytes)
    report.case(title | {"measured": "step() alone"}, times, ratios, moved)
    steps = {name: torch.tensor(values[-rounds:]).numpy() for name, values in whole.items()}
    report.case(title | {"measured": "whole step"}, steps, [Ratio("Async", "torch")])
    opt.close()


if __name__ == "__main__":
    main()
