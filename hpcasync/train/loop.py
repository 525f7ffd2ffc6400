"""The training run of the command line: data, model, mode, epochs, evaluation, records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from hpcasync import models
from hpcasync.comm import World, agree, init, raise_together
from hpcasync.data import Dataset, Loader, loader, open_dataset, verification_batch
from hpcasync.errors import UsageError
from hpcasync.modes import Async, Guided, KStep, Mode, Sync
from hpcasync.modes.local import bind_alone, torch_optimizer
from hpcasync.rules import make_rule
from hpcasync.stats import Staleness
from hpcasync.train.config import TrainConfig
from hpcasync.train.evaluate import evaluate
from hpcasync.train.progress import Progress
from hpcasync.train.records import RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a run gives, on every rank.

    Attributes:
        result: the object that ``--json`` prints.
        ranks: per rank, where its time went and how stale its pushes were.
        folder: of the run's records.
    """

    result: dict[str, Any]
    ranks: list[dict[str, Any]]
    folder: Path


def train(config: TrainConfig) -> Outcome:
    """Train as ``config`` says. Collective.

    Raises:
        UsageError: the same on every rank for bad input.
    """
    world = init(device=config.device, threads=config.threads)
    agree(world, {"--" + k.replace("_", "-"): v for k, v in config.keys().items()})
    dataset, batches, model = _together(world, lambda: _prepare(config, world))
    verification = _together(world, lambda: _verification(config, dataset, world))
    folder = _together(world, lambda: RunFolder(config) if world.rank == 0 else None)
    torch.manual_seed(config.seed + 1 + world.rank)  # dropout and the like differ between ranks
    mode = make_mode(config, model, world)
    with Progress(config.epochs, len(batches), shown=world.rank == 0) as progress:
        run = _Run(config, world, dataset, batches, model, mode, progress, folder, verification)
        run.epochs()
    mode.close()
    ranks = world.gather(_rank_record(mode, run.samples))
    result = _result(config, world, ranks, run)
    if run.guided is not None:
        result["guided"] = _guided_record(run.guided, world)
    _together(world, lambda: folder.finish(result, ranks, config, world) if folder is not None else None)
    path = Path(world.gather(str(folder.path) if folder is not None else "")[0])
    return Outcome(result, ranks, path)


def make_mode(config: TrainConfig, model: nn.Module, world: World) -> Mode:
    """The mode that ``config`` names, around ``model``. Collective."""
    rule = make_rule(config.rule, config.options)
    nonfinite: Any = config.on_nonfinite
    if config.mode == "async":
        return Async(model, rule, staleness=config.staleness, world=world, on_nonfinite=nonfinite)
    optimizer = torch_optimizer(rule, model)
    if config.mode == "sync":
        return Sync(optimizer, world=world, model=model, collectives=config.collectives, on_nonfinite=nonfinite)
    return KStep(
        optimizer,
        every=config.every,
        block_momentum=config.block_momentum,
        nesterov=config.nesterov,
        block_lr=config.block_lr,
        warm_start=config.warm_start,
        inner_state=config.inner_state,
        collectives=config.collectives,
        world=world,
        model=model,
        on_nonfinite=nonfinite,
    )


class _Run:
    """One pass through the epochs."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        dataset: Dataset,
        batches: Loader,
        model: nn.Module,
        mode: Mode,
        progress: Progress,
        folder: RunFolder | None,
        verification: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.config, self.world, self.dataset, self.batches = config, world, dataset, batches
        self.model, self.mode, self.progress, self.folder = model, mode, progress, folder
        steps = config.epochs * len(batches)
        self.schedule = CosineAnnealingLR(mode, steps) if config.schedule == "cosine" else None
        self.guided = None
        if verification is not None:
            assert isinstance(mode, (Async, Sync))
            self.guided = Guided(mode, self._loss, verification, rho=config.rho)
        self.samples = 0
        self.row: dict[str, float] = {}

    def epochs(self) -> None:
        """Train all epochs, evaluate after every ``eval_every``-th and after the last."""
        last = self.config.epochs
        for epoch in range(1, last + 1):
            self.batches.set_epoch(epoch - 1)
            loss = self._epoch(epoch)
            self.mode.synchronize()
            if epoch % self.config.eval_every == 0 or epoch == last:
                self._evaluate(epoch, loss)

    def _epoch(self, epoch: int) -> np.ndarray:
        """One epoch; returns the sum of this rank's losses and the samples behind it."""
        device = self.world.device
        loss_sum, seen = 0.0, 0
        self.mode.share.start()
        for step, (x, y) in enumerate(self.batches, start=1):
            batch = x.to(device), y.to(device)
            if self.guided is not None:
                loss = self.guided.step(batch)
            else:
                self.mode.zero_grad()
                loss = self._loss(batch)
                loss.backward()
                self.mode.step()
            if self.schedule is not None:
                self.schedule.step()
            value = loss.item()
            loss_sum += value * len(y)
            seen += len(y)
            self.progress.step(epoch, step, value)
        self.samples += seen
        return np.array([loss_sum, seen])

    def _loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def _evaluate(self, epoch: int, loss: np.ndarray) -> None:
        world = self.world
        test_loss, accuracy = evaluate(self.model, self.dataset, world)
        world.collectives.allreduce(loss)
        totals = np.array([self.samples, self.mode.updates], np.float64)
        world.collectives.allreduce(totals)
        seconds = max(world.gather(self.mode.share.seconds))
        updates = float(self.mode.updates) if self.mode.mode == "sync" else totals[1]
        self.row = {
            "epoch": epoch,
            "updates": updates,
            "seconds": seconds,
            "train_loss": loss[0] / loss[1],
            "test_loss": test_loss,
            "test_accuracy": accuracy,
        }
        if self.folder is not None:
            self.folder.add(self.row)
        self.progress.evaluated(self.row, totals[0] / seconds)


def _prepare(config: TrainConfig, world: World) -> tuple[Dataset, Loader, nn.Module]:
    rule = make_rule(config.rule, config.options)  # refused now if it does not fit, before a folder is made
    rule = rule.bind(world.size) if config.mode == "async" else bind_alone(rule)
    dataset = open_dataset(config.data)
    batches = loader(dataset, world, batch=config.batch, seed=config.seed, partition=config.partition)
    torch.manual_seed(config.seed)
    model = models.build(config.model, dataset.shape, dataset.classes).to(world.device)
    return dataset, batches, model.train()


def _verification(config: TrainConfig, dataset: Dataset, world: World) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not config.guided:
        return None
    x, y = verification_batch(dataset, config.verification, config.seed)
    return x.to(world.device), y.to(world.device)


def _guided_record(guided: Guided, world: World) -> dict[str, int]:
    """What guidance cost over all ranks, beside the ordinary steps; replays of `Sync` are updates that all share."""
    own = (guided.evaluations, guided.gradients, guided.replays)
    evaluations, gradients, replays = (sum(column) for column in zip(*world.gather(own)))
    shared = guided.replays if isinstance(guided.mode, Sync) else replays
    return {"rho": guided.rho or 0, "evaluations": evaluations, "gradients": gradients, "replays": shared}


def _together(world: World, work: Any) -> Any:
    """Run ``work`` on every rank; if it fails with bad input anywhere, raise that on every rank."""
    value, problem = None, None
    try:
        value = work()
    except UsageError as error:
        problem = str(error)
    raise_together(world, problem)
    return value


def _rank_record(mode: Mode, samples: int) -> dict[str, Any]:
    share = mode.share
    return {
        "seconds": share.seconds,
        "compute": share.compute,
        "communicate": share.communicate,
        "wait": share.wait,
        "share": share.shares(),
        "samples": samples,
        "updates": mode.updates,
        "skipped": mode.skipped,
        "staleness": mode.staleness.counts,
    }


def _result(config: TrainConfig, world: World, ranks: list[dict[str, Any]], run: _Run) -> dict[str, Any]:
    staleness = Staleness()
    for rank in ranks:
        staleness = staleness.merge(Staleness(rank["staleness"]))
    seconds = max(rank["seconds"] for rank in ranks)
    return {
        "test_accuracy": run.row["test_accuracy"],
        "test_loss": run.row["test_loss"],
        "train_loss": run.row["train_loss"],
        "samples_per_second": sum(rank["samples"] for rank in ranks) / seconds,
        "seconds": seconds,
        "updates": int(run.row["updates"]),
        "skipped": sum(rank["skipped"] for rank in ranks),
        "epochs": config.epochs,
        "ranks": world.size,
        "nodes": world.nodes,
        "mode": config.mode,
        "rule": config.rule,
        "base": config.options["base"],
        "data": config.data,
        "model": config.model,
        "seed": config.seed,
        "staleness": staleness.summary(),
        "share": {k: float(np.mean([r["share"][k] for r in ranks])) for k in ("compute", "communicate", "wait")},
    }
