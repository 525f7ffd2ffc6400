"""A training step of `Sync` against torch's DistributedDataParallel (gloo) in the same processes.

Every side trains its own copy of the same model on the same batch, in blocks in turn; all ranks run the same
side at the same time. `local` is the same step without averaging: what is above it is the price of
communication; `Sync, window` averages through the node's shared memory. DistributedDataParallel runs without its
broadcast of buffers, since Sync has none; once with its defaults, once with `gradient_as_bucket_view=True`,
which saves it a copy.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from _common import Ratio, Report, begin, copy_of, finish, interleave, launch, make_parser, timed, wide_mlp
from torch import nn

MODELS = ("lenet5", "resnet20", "mlp")
BATCH = {"lenet5": 64, "resnet20": 32, "mlp": 64}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    about = begin("sync")
    models = args.models or (MODELS[:1] if args.quick else MODELS)
    rounds = args.rounds or (5 if args.quick else 25)
    rows = launch(args.ranks, ["--rounds", str(rounds), "--models", *models])
    finish(args, "sync", about, rows)


def work(args) -> None:
    """One rank."""
    import torch.distributed as dist

    import hpcasync

    world = hpcasync.init(device="cpu", threads=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = world.gather(free.getsockname()[1])[0]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size)
    report = Report(quiet=world.rank > 0)
    for name in args.models:
        measure(world, report, name, args.rounds)
    world.collectives.barrier()
    dist.destroy_process_group()
    if world.rank == 0:
        args.worker.write_text(json.dumps(report.rows))


def make_model(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    """The model, a batch for it, and its number of classes."""
    from hpcasync.models import build

    if name == "mlp":
        model, inputs, classes = wide_mlp()
        return model, torch.randn(BATCH[name], inputs), classes
    shape = (1, 28, 28) if name == "lenet5" else (3, 32, 32)
    return build(name, shape, 10), torch.randn(BATCH[name], *shape), 10


def measure(world, report: Report, name: str, rounds: int) -> None:
    """All sides in turn, on all ranks."""
    from torch.nn.parallel import DistributedDataParallel

    import hpcasync

    torch.manual_seed(0)
    model, x, classes = make_model(name)
    y = torch.randint(classes, (BATCH[name],))

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=1e-3)

    mine, alone = copy.deepcopy(model), copy.deepcopy(model)
    mode = hpcasync.Sync(sgd(mine), model=mine, world=world)
    shared = copy.deepcopy(model)
    window = hpcasync.Sync(sgd(shared), model=shared, world=world, collectives="window")
    warnings.filterwarnings(
        "ignore", "`broadcast_buffers` is deprecated", FutureWarning
    )  # its successor is too new
    ddp = DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
    view = DistributedDataParallel(
        copy.deepcopy(model), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    works: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
        "DDP": (ddp, sgd(ddp)),
        "Sync": (mine, mode),
        "Sync, window": (shared, window),
        "DDP, gradients are bucket views": (view, sgd(view)),
        "local": (alone, sgd(alone)),
    }
    sides = {}
    block = {"lenet5": 20, "resnet20": 4, "mlp": 1}[name]
    for side, (module, opt) in works.items():

        def step(module=module, opt=opt) -> None:
            opt.zero_grad()
            F.cross_entropy(module(x), y).backward()
            opt.step()

        sides[side] = timed(step, block)
    # A rank's least traffic: its part of all gradients in, its part of the sum out, the others' parts across.
    count = sum(p.numel() for p in model.parameters())
    nbytes = int(4 * count * (1 + 1 / world.size + 2 * (world.size - 1) / world.size))
    do, scale = copy_of(nbytes)
    sides["copy of the allreduce's bytes"] = timed(do, block)
    times = interleave(sides, rounds, meet=world.collectives.barrier, warm_up=3)
    times = {side: np.mean(world.gather(values), axis=0) for side, values in times.items()}
    times["copy of the allreduce's bytes"] *= scale
    times["limit"] = times["local"] + times.pop("copy of the allreduce's bytes")
    title = {"model": name, "parameters": count, "batch": BATCH[name], "ranks": world.size}
    report.case(
        title,
        times,
        [
            Ratio("Sync", "DDP", 1.0),
            Ratio("Sync", "DDP, gradients are bucket views"),
            Ratio("Sync, window", "DDP", 1.0),
            Ratio("Sync, window", "DDP, gradients are bucket views", 1.0),
            Ratio("Sync", "limit"),
            Ratio("DDP", "limit"),
        ],
    )
    same = all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(mine.parameters(), ddp.parameters(), strict=True)
    )
    if not same:
        raise SystemExit(f"{name}: Sync and DDP trained different models, the comparison is void")
    mode.close()
    window.close()


if __name__ == "__main__":
    main()
