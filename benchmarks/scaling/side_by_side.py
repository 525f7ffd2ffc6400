"""Training steps of hpcasync beside what a user would pick instead, on the same model, batches and cores.

`Async`, `Sync`, `KStep` (K = 32, 8 for the large model) are ours, `Sync` and `KStep` through the window; `DDP` (gloo, gradients
are bucket views) and `PostLocalSGD` (the same K) torch's; `Horovod` takes part where it is built; `server` is a two-sided
parameter server in mpi4py, as the authors of APAM did it, with a master in a process of its own, one more than the ranks. Times
are of one step of a rank; all sides make the same number of samples in it. `exchange` is the push and pull alone, of all ranks
at once.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _common import Others, Ratio, Report, begin, finish, interleave, launch, make_parser, timed, wide_mlp
from _server import Worker, serve

BATCH = 64
BLOCK = {"lenet5": 32, "mlp": 2}  # steps that are timed at a time
EVERY = {"lenet5": 32, "mlp": 8}  # K; a whole block is timed
LR = 1e-3


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(BLOCK), help="default: lenet5 mlp")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 2 4")
    parser.add_argument("--part", choices=("ranks", "server"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    about = begin("side_by_side")
    rounds = args.rounds or (2 if args.quick else 12)
    turns = 1 if args.quick else 3
    report, others = Report(), Others()
    for ranks in args.ranks or ([2] if args.quick else [2, 4]):
        for name in args.models or (["lenet5"] if args.quick else list(BLOCK)):
            times: dict[str, list[np.ndarray]] = {}
            for _ in range(turns):  # the server needs one process more: launches take turns
                for part, more in (("ranks", 0), ("server", 1)):
                    words = ["--rounds", str(-(-rounds // turns)), "--models", name, "--part", part]
                    with others:
                        (found,) = launch(ranks + more, words)
                    for side, values in found.items():
                        times.setdefault(side, []).append(np.array(values))
            case(report, name, ranks, {side: np.concatenate(values) for side, values in times.items()})
    print(f"\n{others.show()}", flush=True)
    finish(args, "side_by_side", about, report.rows)


def case(report: Report, name: str, ranks: int, times: dict[str, np.ndarray]) -> None:
    """Print the table of one model, with the samples per second of all ranks."""
    others = [side for side in ("DDP", "PostLocalSGD", "Horovod", "server") if side in times]
    ratios = [Ratio("Async", side) for side in others]
    ratios += [Ratio("Sync", side) for side in ("DDP", "Horovod") if side in times] + [Ratio("KStep", "PostLocalSGD")]
    ratios.append(Ratio("Async, exchange", "server, exchange", 1 / 3 if name == "mlp" else None))
    report.case({"model": name, "batch": BATCH, "ranks": ranks}, times, ratios)
    speed = {side: ranks * BATCH / float(np.median(t)) for side, t in times.items() if "exchange" not in side}
    report.rows[-1]["samples_per_second"] = speed
    print("  samples/s: " + ", ".join(f"{side} {value:,.0f}" for side, value in speed.items()), flush=True)


def work(args: Any) -> None:
    """One rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    (name,) = args.models
    model, x, classes = make_model(name)
    y = torch.randint(classes, (BATCH,))
    times = of_server(args, name, model, x, y) if args.part == "server" else of_ranks(args, name, model, x, y)
    if times is not None:
        args.worker.write_text(json.dumps([{side: list(values) for side, values in times.items()}]))


def make_model(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    """The model, a batch for it, and its number of classes."""
    from hpcasync.models import build

    if name == "mlp":
        model, inputs, classes = wide_mlp()
        return model, torch.randn(BATCH, inputs), classes
    return build(name, (1, 28, 28), 10), torch.randn(BATCH, 1, 28, 28), 10


def of_server(args: Any, name: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray] | None:
    """The sides of the server; its last rank is the master and gives nothing."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    workers = comm.Split(0 if comm.rank < comm.size - 1 else MPI.UNDEFINED, comm.rank)
    if workers == MPI.COMM_NULL:
        serve(comm, model, LR)
        return None
    worker = Worker(comm, model)

    def step() -> None:
        worker.zero_grad()
        F.cross_entropy(model(x), y).backward()
        worker.step()

    sides = {"server": timed(step, BLOCK[name]), "server, exchange": timed(worker.step, BLOCK[name])}
    times = interleave(sides, args.rounds, meet=workers.Barrier, warm_up=1)
    found = {side: np.mean(workers.allgather(values), axis=0) for side, values in times.items()}
    worker.close()
    return found if comm.rank == 0 else None


def of_ranks(args: Any, name: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray] | None:
    """All other sides, in the same processes."""
    import torch.distributed as dist
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.nn.parallel import DistributedDataParallel

    import hpcasync
    from hpcasync.rules import make_rule

    world = hpcasync.init(device="cpu", threads=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = world.gather(free.getsockname()[1])[0]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size)

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=LR)

    models = {side: copy.deepcopy(model) for side in ("Async", "Sync", "KStep", "DDP", "PostLocalSGD", "Horovod")}
    modes = {
        "Async": hpcasync.Async(models["Async"], make_rule("asgd", {"base": "sgd", "lr": LR}), world=world),
        "Sync": hpcasync.Sync(sgd(models["Sync"]), model=models["Sync"], world=world, collectives="window"),
        "KStep": hpcasync.KStep(
            sgd(models["KStep"]), model=models["KStep"], world=world, every=EVERY[name], collectives="window"
        ),
    }
    ddp = DistributedDataParallel(models["DDP"], broadcast_buffers=False, gradient_as_bucket_view=True)
    local = PostLocalSGDOptimizer(sgd(models["PostLocalSGD"]), PeriodicModelAverager(period=EVERY[name], warmup_steps=0))
    works: dict[str, tuple[nn.Module, Any]] = {side: (models[side], mode) for side, mode in modes.items()}
    works |= {"DDP": (ddp, sgd(ddp)), "PostLocalSGD": (models["PostLocalSGD"], local)}
    try:
        import horovod.torch as hvd

        hvd.init()
        module = models["Horovod"]
        works["Horovod"] = (module, hvd.DistributedOptimizer(sgd(module), named_parameters=module.named_parameters()))
    except ImportError as error:
        if world.rank == 0:
            print(f"without Horovod: {error}", flush=True)
    sides = {}
    # A whole period is timed where an average comes every K steps.
    for side, (module, optimizer) in works.items():

        def step(module=module, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

        sides[side] = timed(step, EVERY[name] if side in ("KStep", "PostLocalSGD") else BLOCK[name])
    sides["Async, exchange"] = timed(modes["Async"].step, BLOCK[name])  # the last gradients again
    times = interleave(sides, args.rounds, meet=world.collectives.barrier, warm_up=1)
    found = {side: np.mean(world.gather(values), axis=0) for side, values in times.items()}
    for mode in modes.values():
        mode.close()
    world.collectives.barrier()
    dist.destroy_process_group()
    return found if world.rank == 0 else None


if __name__ == "__main__":
    main()
