"""A small data set and short runs for the tests of the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcasync.data import Arrays, Dataset, open_dataset, write_dataset
from hpcasync.simulate import make_simulate_config
from hpcasync.simulate.run import Outcome, make_simulation, simulate
from hpcasync.simulate.simulation import Simulation

FEATURES, CLASSES = 6, 3


def dataset(folder: Path, samples: int = 96) -> Dataset:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((samples, FEATURES)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)
    write_dataset(folder / "toy.h5", Arrays(x, y, x[:20], y[:20]))
    return open_dataset(folder / "toy.h5")


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, CLASSES))


def run(data: Dataset, model: nn.Module | None = None, **keys: Any) -> Outcome:
    config = make_simulate_config({"batch": 4, "epochs": 2, "rule": "asgd", **keys})
    return simulate(config, dataset=data, model=mlp() if model is None else model, records=False, shown=False)


def simulation(data: Dataset, model: nn.Module | None = None, **keys: Any) -> Simulation:
    config = make_simulate_config({"batch": 4, "epochs": 2, "rule": "asgd", **keys})
    return make_simulation(config, data, mlp() if model is None else model)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.int32)
