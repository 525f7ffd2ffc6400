"""The simulator's gradients, computed ahead on all threads, against its naive event loop, one autograd call after the other.

Both sides are the whole event loop of the same run: virtual clock, data, gradients, the rule on the store; without evaluation.
32 virtual workers on random images of 28 x 28. Times are per gradient. ``limit`` is the perceptron's compiled gradient and the
rule's pass alone, on one thread, over the number of threads: what is left without Python and with perfect overlap.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _common import Ratio, Report, begin, finish, interleave, make_parser

MODELS = {"mlp": 3.0, "lenet5": 1.0}  # how many times faster than naive it should be at 32 workers
RULE = {"rule": "asgd", "lr": 0.01}
COMPUTE = ("constant:1.0", "lognormal:1.0,0.3", "exponential:1.0")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", help="samples per gradient (default 32 and 4)")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads (default: all cores)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()

    import torch

    from hpcasync.data import Arrays, open_dataset, write_dataset

    rounds = args.rounds or (3 if args.quick else 11)
    steps = 2 if args.quick else 12
    threads = args.threads or [torch.get_num_threads()]
    about = begin("simulator")
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for batch in args.batch or ((32,) if args.quick else (32, 4)):
            count = args.workers * batch * steps
            x, y = rng.integers(0, 256, (count, 1, 28, 28), np.uint8), rng.integers(0, 10, count)
            path = Path(folder) / f"{batch}.h5"
            write_dataset(path, Arrays(x, y, x[:10], y[:10]))
            dataset = open_dataset(path)
            for model in args.models:
                for compute in COMPUTE[:1] if args.quick else COMPUTE:
                    for number in threads:
                        torch.set_num_threads(number)
                        sides = {
                            name: side(dataset, model, compute, args.workers, batch, naive=name == "naive")
                            for name in ("batched", "naive")
                        }
                        ratios = [Ratio("naive", "batched")]
                        if model == "mlp":
                            sides["limit"] = limit(dataset, args.workers, batch, number)
                            ratios.append(Ratio("batched", "limit"))
                        times = interleave(sides, rounds)
                        target = 1 / MODELS[model] if compute.startswith("lognormal") else None
                        title = {"model": model, "workers": args.workers, "batch": batch, "compute": compute, "threads": number}
                        report.case(title, times, [Ratio("batched", "naive", target), *ratios])
    finish(args, "simulator", about, report.rows)


def side(dataset, model: str, compute: str, workers: int, batch: int, *, naive: bool) -> Callable[[], float]:
    """Simulates one epoch; returns seconds per gradient."""
    import torch

    from hpcasync import models
    from hpcasync.simulate import make_simulate_config
    from hpcasync.simulate.run import make_simulation

    keys = {"workers": workers, "batch": batch, "compute": compute, "epochs": 1, **RULE, "naive": naive}
    config = make_simulate_config(keys)

    def run() -> float:
        torch.manual_seed(0)
        simulation = make_simulation(config, dataset, models.build(model, dataset.shape, dataset.classes).train())
        began = time.perf_counter()
        simulation.run()
        seconds = time.perf_counter() - began
        simulation.gradients.close()
        return seconds / simulation.updates

    return run


def limit(dataset, workers: int, batch: int, threads: int) -> Callable[[], float]:
    """Compiled gradients and passes of the rule on every worker's copy in turn; seconds per gradient over ``threads``."""
    from hpcasync import models
    from hpcasync.simulate import make_simulate_config
    from hpcasync.simulate.perceptron import Perceptron
    from hpcasync.simulate.run import make_simulation

    config = make_simulate_config({"workers": workers, "batch": batch, "epochs": 1, **RULE, "naive": True})
    model = models.build("mlp", dataset.shape, dataset.classes).train()
    simulation = make_simulation(config, dataset, model)
    compiled = Perceptron(model, simulation.layout.starts, dataset.as_torch(), 1)
    rule, state = simulation.stores[0].rule, simulation.stores[0].state
    hyper, gradient = simulation.hypers(0)[0], np.zeros(simulation.layout.total, np.float32)
    batches = [np.arange(i * batch, (i + 1) * batch) for i in range(workers)]

    def run() -> float:
        began = time.perf_counter()
        for copy, indices in zip(simulation.copies, batches, strict=True):
            compiled(0, copy, indices, gradient)
            rule.update(state, 0, gradient, copy, hyper, 1, 0)
        return (time.perf_counter() - began) / workers / threads

    return run


if __name__ == "__main__":
    main()
