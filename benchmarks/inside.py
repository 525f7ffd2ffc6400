"""What an evaluation's look inside a method costs, in steps: trend-smooth's shrink shares and the norms of a block momentum.

One rank, one thread, random samples. `step` is forward, backward and `opt.step()`; the others are made once per evaluation.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from _common import Ratio, Report, begin, finish, interleave, make_parser, timed, wide_mlp

from hpcasync.comm import World
from hpcasync.models import build
from hpcasync.modes import Async, KStep
from hpcasync.modes.flat import flat_grad
from hpcasync.modes.inside import shrink_shares
from hpcasync.rules import TrendSmooth


def main() -> None:
    args = make_parser(__doc__).parse_args()
    rounds = args.rounds or (3 if args.quick else 40)
    torch.set_num_threads(1)
    about, report = begin("inside"), Report()
    for name in ("lenet5", "wide-mlp"):
        if name == "lenet5":
            model, shape, classes = build("lenet5", (1, 28, 28), 10), (1, 28, 28), 10
        else:
            model, inputs, classes = wide_mlp(256 if args.quick else 4096)
            shape = (inputs,)
        x, y = torch.randn(32, *shape), torch.arange(32) % classes
        other = build("lenet5", (1, 28, 28), 10) if name == "lenet5" else wide_mlp(256 if args.quick else 4096)[0]
        opt = Async(model, TrendSmooth(base="momentum"), world=World())
        block = KStep(torch.optim.SGD(other.parameters(), lr=0.1), block_momentum=0.9, model=other, world=World())

        def step(opt: Async = opt, model: torch.nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

        def shares(opt: Async = opt) -> None:
            grads = [flat_grad(p, "") for p in opt.params]
            shrink_shares(opt.store, opt._worker, grads, opt._hypers(), opt.store.layout, opt._flat.names)

        step()
        sides = {"step": timed(step), "shrink shares": timed(shares), "momentum norms": timed(block.momentum_norms)}
        times = interleave(sides, rounds, warm_up=2)
        size = int(np.sum([p.numel() for p in opt.params]))
        report.case({"model": name, "parameters": size}, times, [Ratio(side, "step") for side in list(sides)[1:]])
        opt.close()
        block.close()
    finish(args, "inside", about, report.rows)


if __name__ == "__main__":
    main()
