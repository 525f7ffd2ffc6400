"""The training loop of `hpcasync train` in blocks of steps, for benchmarks of what a step pays beside the training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def folder_of(world) -> Iterator[tuple[Path, str]]:
    """A folder that all ranks see, and the path of a data set in it. Collective, also at its end."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(world.gather(folder)[0])
        data = where / "data.h5"
        if world.rank == 0:
            write_data(data)
        world.collectives.barrier()
        yield where, str(data)
        world.collectives.barrier()


def write_data(path: Path) -> None:
    """Random samples: only their shape matters here."""
    from hpcasync.data.layout import Arrays
    from hpcasync.data.write import write_dataset

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12_000, 1, 28, 28), np.uint8), np.arange(12_000) % 10
    write_dataset(path, Arrays(x[:10_000], y[:10_000], x[10_000:], y[10_000:]))


def make_run(world, model: str, data: str, batch: int):
    """A run as `hpcasync train` makes it, about to make its first step."""
    from hpcasync.train import loop
    from hpcasync.train.config import make_config
    from hpcasync.train.prepare import make_mode, prepare
    from hpcasync.train.progress import Progress

    keys = {"data": data, "model": model, "batch": batch, "epochs": 1000, "threads": 1}
    config = make_config(keys)
    dataset, batches, net = prepare(config, world)
    mode = make_mode(config, net, world)
    return loop.Run(config, world, dataset, batches, net, mode, Progress(1, 1, shown=False), None, None)


def steps_of(run, block: int, set_up: Callable[[], None]) -> Callable[[], float]:
    """A side: so many steps of the loop after ``set_up``."""

    class Stopper:
        """In place of the keeper of checkpoints: leaves the epoch after a block."""

        left = 0

        def after_step(self) -> bool:
            self.left -= 1
            return self.left == 0

    stopper = Stopper()

    def side() -> float:
        run.step, stopper.left = 0, block
        set_up()
        began = time.perf_counter()
        while stopper.left:  # a block may be longer than an epoch
            run.step = 0
            run._epoch(stopper)
        return (time.perf_counter() - began) / block

    return side
