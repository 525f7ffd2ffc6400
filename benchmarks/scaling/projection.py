"""PROJECTION, not a measurement: asynchronous and synchronous training on 1 to 1,024 nodes, by the dry simulator.

Measured here, on one rank: the seconds of a gradient (a lognormal distribution is fitted) and the bandwidth at which the store
applies a push. Assumed: the network (--network, LATENCY,BANDWIDTH of every link), one rank per node, every node as fast as this
one, shards dealt evenly, no topology, no congestion but the queues at the shards. Synchronous training is the slowest of
the drawn steps plus a ring allreduce over the same network.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _common import Ratio, Report, begin, finish, make_parser
from side_by_side import BATCH, make_model

NETWORKS = {"1 Gbit/s Ethernet": "50us,125MB/s", "25 GB/s fabric": "2us,25GB/s"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--nodes", nargs="+", type=int, help="default: 1 4 16 64 256 1024")
    parser.add_argument("--models", nargs="+", choices=["lenet5", "mlp"], help="default: both")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown too")
    args = parser.parse_args()
    about = begin("projection")
    report, text = Report(quiet=True), []
    for name in args.models or (["lenet5"] if args.quick else ["lenet5", "mlp"]):
        gradients, pushes, count = measure(name, 20 if args.quick else 200 if name == "lenet5" else 40)
        mean, sigma = float(np.mean(gradients)), float(np.std(np.log(gradients)))
        service = 4 * count / float(np.median(pushes))
        head = f"{name}, {count:,} parameters, batch {BATCH}: gradient {1e3 * mean:.2f} ms (sigma of its log {sigma:.2f}), "
        text += [head + f"store {service / 1e9:.2f} GB/s of parameters (measured)", ""]
        for network, numbers in NETWORKS.items():
            rows = [project(n, count, mean, sigma, service, numbers) for n in args.nodes or (1, 4, 16, 64, 256, 1024)]
            text += table(network, numbers, rows)
            times = {"gradient": np.array(gradients), "push": np.array(pushes)}
            report.case({"model": name, "network": numbers, "projection": rows}, times, [Ratio("push", "gradient")])
    print("\n".join(["", "PROJECTION from one measured rank; the network is assumed", "", *text]), flush=True)
    if args.out:
        args.out.write_text("\n".join(text) + "\n")
    finish(args, "projection", about, report.rows)


def measure(name: str, steps: int) -> tuple[list[float], list[float], int]:
    """Seconds of gradients and of pushes on one rank, and the number of parameters."""
    import hpcasync
    from hpcasync.rules import make_rule

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x, classes = make_model(name)
    y = torch.randint(classes, (BATCH,))
    model = copy.deepcopy(model)
    gradients, pushes = [], []
    world = hpcasync.init(device="cpu", threads=1)
    with hpcasync.Async(model, make_rule("asgd", {"base": "sgd", "lr": 1e-3}), world=world) as mode:
        for turn in range(-3, steps):
            began = time.perf_counter()
            mode.zero_grad()
            F.cross_entropy(model(x), y).backward()
            computed = time.perf_counter()
            mode.step()
            if turn >= 0:
                gradients.append(computed - began)
                pushes.append(time.perf_counter() - computed)
    return gradients, pushes, sum(p.numel() for p in model.parameters())


def project(nodes: int, count: int, mean: float, sigma: float, service: float, network: str) -> dict[str, Any]:
    """One line: the dry simulation of ``nodes`` workers, and synchronous steps with the same draws."""
    from hpcasync.simulate.cluster import parse_network
    from hpcasync.simulate.config import make_simulate_config
    from hpcasync.simulate.dry import dry_run

    keys = {
        "workers": nodes, "dry": True, "parameters": count, "batch": BATCH, "network": network, "updates": 200 * nodes,
        "compute": f"lognormal:{mean:.9f},{sigma:.6f}", "service": f"{service / 1e6:.3f}MB/s",
    }  # fmt: skip
    found = dry_run(make_simulate_config(keys, {}))
    rng = np.random.default_rng(0)
    draws = mean * np.exp(sigma * rng.standard_normal((200, nodes)) - sigma**2 / 2)
    step = float(draws.max(axis=1).mean()) + parse_network(network).allreduce(4 * count, nodes)
    alone = BATCH / (mean + 4 * count / service)
    asynchronous, synchronous = found["samples_per_second"], nodes * BATCH / step
    return {
        "nodes": nodes, "async": asynchronous, "async_efficiency": asynchronous / alone / nodes,
        "staleness": found["staleness"]["mean"], "store_busy": found["store_busy"],
        "sync": synchronous, "sync_efficiency": synchronous * mean / BATCH / nodes,
    }  # fmt: skip


def table(name: str, network: str, rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    head = ["nodes", "async samples/s", "efficiency", "staleness", "store busy", "sync samples/s", "efficiency"]
    lines = [f"Network assumed: {name} ({network})", "", "| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for row in rows:
        cells = [
            f"{row['nodes']:,}", f"{row['async']:,.0f}", f"{row['async_efficiency']:.2f}", f"{row['staleness']:,.0f}",
            f"{100 * row['store_busy']:.0f} %", f"{row['sync']:,.0f}", f"{row['sync_efficiency']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
