"""What a run trains with: the data, the model, the mode, the monitor that ``config`` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcasync import models
from hpcasync.comm import World
from hpcasync.data import Dataset, Loader, loader, open_dataset, verification_batch
from hpcasync.data.partition import check_batch
from hpcasync.errors import UsageError
from hpcasync.modes import Async, Hierarchical, KStep, Mode, Sync
from hpcasync.modes.block import BLOCK_KEYS
from hpcasync.modes.local import bind_alone, torch_optimizer
from hpcasync.rules import make_rule
from hpcasync.train.config import TrainConfig
from hpcasync.train.monitor import Monitor


def prepare(config: TrainConfig, world: World) -> tuple[Dataset, Loader, nn.Module]:
    """The data set, this rank's batches, and the model, the same on all ranks.

    Raises:
        UsageError: bad input; perhaps on some ranks only.
    """
    rule = make_rule(config.rule, config.options)  # refused now if it does not fit, before a folder is made
    rule = rule.bind(world.size) if config.mode in ("async", "hierarchical") else bind_alone(rule)
    dataset = open_dataset(config.data)
    if config.partition == "iid":
        check_batch(config.batch, len(dataset.as_torch("train")), world.size)
    batches = loader(dataset, world, batch=config.batch, seed=config.seed, partition=config.partition)
    torch.manual_seed(config.seed)
    model = models.build(config.model, dataset.shape, dataset.classes).to(world.device)
    return dataset, batches, model.train()


def verification(config: TrainConfig, dataset: Dataset, world: World) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The batch of guided SGD, on the device; None without ``guided``."""
    if not config.guided:
        return None
    x, y = verification_batch(dataset, config.verification, config.seed)
    return x.to(world.device), y.to(world.device)


def make_mode(config: TrainConfig, model: nn.Module, world: World) -> Mode:
    """The mode that ``config`` names, around ``model``. Collective."""
    rule = make_rule(config.rule, config.options)
    nonfinite: Any = config.on_nonfinite
    if config.mode == "async":
        return Async(model, rule, staleness=config.staleness, world=world, on_nonfinite=nonfinite, progress=config.progress)
    block = {k: getattr(config, k) for k in BLOCK_KEYS}
    if config.mode == "hierarchical":
        return Hierarchical(
            model,
            rule,
            **block,
            delay=config.delay,
            groups=config.groups,
            collectives=config.collectives,
            staleness=config.staleness,
            world=world,
            on_nonfinite=nonfinite,
        )
    optimizer = torch_optimizer(rule, model)
    common: dict[str, Any] = {"world": world, "model": model, "collectives": config.collectives, "on_nonfinite": nonfinite}
    if config.mode == "sync":
        return Sync(optimizer, **common)
    return KStep(optimizer, **block, **common)


def make_monitor(config: TrainConfig, mode: Mode, folder: Path, steps: int) -> Monitor | None:
    """What ``--live`` and ``--tensorboard`` ask for, None for neither. Collective.

    Raises:
        UsageError: as `Monitor`; the mode is closed then.
    """
    if not (config.live or config.tensorboard):
        return None
    files = folder / "tensorboard" if config.tensorboard else None
    try:
        monitor = Monitor(
            mode, live=config.live, tensorboard=files, title=config.name, steps=config.epochs * steps, epochs=config.epochs
        )
    except UsageError:
        mode.close()
        raise
    monitor.text("config", "".join(f"    {key} = {value!r}\n" for key, value in config.keys().items()))
    return monitor
