"""A whole simulated run: data, model, mode, evaluation, and the records of a live run."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcasync import models
from hpcasync.comm import World
from hpcasync.data import Dataset, open_dataset
from hpcasync.simulate.asynchronous import Asynchronous
from hpcasync.simulate.averaged import Averaged
from hpcasync.simulate.config import SimulateConfig
from hpcasync.simulate.simulation import Simulation
from hpcasync.simulate.synchronous import Synchronous
from hpcasync.train.evaluate import evaluate
from hpcasync.train.outcome import result_of
from hpcasync.train.progress import Progress
from hpcasync.train.records import RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a simulated run gives.

    Attributes:
        result: the object that ``--json`` prints.
        ranks: per worker, where its virtual time went and how stale its pushes were.
        folder: of the run's records; None where none were asked for.
        parameters: float32, the final shared parameters, flat.
        curve: a row per evaluation.
    """

    result: dict[str, Any]
    ranks: list[dict[str, Any]]
    folder: Path | None
    parameters: np.ndarray
    curve: list[dict[str, Any]]


def simulate(
    config: SimulateConfig,
    *,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    records: bool = True,
    shown: bool = True,
) -> Outcome:
    """Simulate as ``config`` says; in one process, without MPI.

    Args:
        config: from ``make_simulate_config``.
        dataset: in place of the one that ``config.data`` names.
        model: in place of the one that ``config.model`` names; it is taken over.
        records: whether to write a run's folder.
        shown: whether to show progress.

    Raises:
        UsageError: bad input.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = open_dataset(config.data) if dataset is None else dataset
    if model is None:
        torch.manual_seed(config.seed)
        model = models.build(config.model, dataset.shape, dataset.classes).train()
    simulation = make_simulation(config, dataset, model)
    note = simulation.gradients.note
    if note:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    folder = RunFolder(config) if records else None
    # The worker's number would be the rank's; one stream for all is enough for dropout.
    torch.manual_seed(config.seed + 1)
    began = time.perf_counter()
    world = World()
    with Progress(config.epochs, simulation.steps_per_epoch * config.workers, shown=shown) as progress:
        watch = _Watch(simulation, dataset, world, folder, progress)
        simulation.run()
    simulation.gradients.close()
    ranks = [w.record(simulation.now) for w in simulation.workers]
    if config.mode not in ("async", "hierarchical"):  # as live
        for rank in ranks:
            del rank["discarded"]
    nodes = len(simulation.stores)
    result = result_of(config, simulation.rule, ranks, watch.rows[-1], seconds=simulation.now, nodes=nodes) | {
        "virtual_seconds": simulation.now,
        "wall_seconds": time.perf_counter() - began,
        "workers": config.workers,
        "gradients": {"lane": simulation.gradients.lane, "threads": simulation.gradients.lanes},
    }
    if simulation.guidance is not None:
        result["guided"] = simulation.guidance.record()
    if folder is not None:
        folder.finish(result, ranks, config, world)
    return Outcome(result, ranks, folder.path if folder is not None else None, watch.parameters, watch.rows)


def make_simulation(config: SimulateConfig, dataset: Dataset, model: nn.Module) -> Simulation:
    """The simulation of the mode that ``config`` names."""
    kind = {"sync": Synchronous, "async": Asynchronous}.get(config.mode, Averaged)
    return kind(config, dataset, model)


class _Watch:
    """Evaluates the model when the simulation says so."""

    def __init__(
        self, simulation: Simulation, dataset: Dataset, world: World, folder: RunFolder | None, progress: Progress
    ) -> None:
        self._simulation, self._dataset, self._world = simulation, dataset, world
        self._folder, self._progress = folder, progress
        self.rows: list[dict[str, Any]] = []
        self.parameters = np.empty(0, np.float32)
        simulation.evaluated = self._evaluate
        simulation.stepped = progress.step

    def _evaluate(self, epoch: float, seconds: float, w: np.ndarray) -> None:
        simulation = self._simulation
        self.parameters = w.copy()
        with simulation.gradients.evaluation(self.parameters) as model:
            test_loss, accuracy = evaluate(model, self._dataset, self._world)
        loss, samples = simulation.loss
        row: dict[str, Any] = {
            "epoch": epoch,
            "updates": float(simulation.updates),
            "seconds": seconds,
            "samples": float(simulation.total_samples),
            "train_loss": loss / samples if samples else float("nan"),
            "test_loss": test_loss,
            "test_accuracy": accuracy,
        }
        inside = simulation.inside.row(simulation.workers)
        if inside:
            row["inside"] = inside
        simulation.loss = [0.0, 0.0]
        self.rows.append(row)
        if self._folder is not None:
            self._folder.add(row)
        self._progress.evaluated(row, simulation.total_samples / seconds if seconds else 0.0)
