"""The training run of the command line: data, model, mode, epochs, evaluation, records."""

from __future__ import annotations

import random
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcasync import launched
from hpcasync.comm import World, agree, init, together
from hpcasync.data import Dataset, Loader
from hpcasync.errors import UsageError
from hpcasync.modes import Mode
from hpcasync.rules import make_rule
from hpcasync.train import signals
from hpcasync.train.checkpoint_ranks import Reading, read_ranks
from hpcasync.train.config import TrainConfig
from hpcasync.train.event_file import check_tensorboard
from hpcasync.train.keeper import Keeper
from hpcasync.train.outcome import Outcome, guided_record, rank_record, result_of
from hpcasync.train.prepare import make_mode, make_monitor, prepare, verification
from hpcasync.train.progress import Progress
from hpcasync.train.records import RunFolder
from hpcasync.train.resume import check_run, find
from hpcasync.train.run import Run
from hpcasync.train.slow import Slowdown, parse_slow
from hpcasync.train.stall import watch_run, watched
from hpcasync.train.survive import Survival


def train(config: TrainConfig) -> Outcome:
    """Train as ``config`` says. Collective.

    Raises:
        UsageError: the same on every rank for bad input.
    """
    world = init(device=config.device, threads=config.threads, host_ranks=config.host_ranks or 0)
    if signals.installed():
        signals.install()  # again: MPI may have put handlers of its own there
    agree(world, {"--" + k.replace("_", "-"): v for k, v in config.keys().items()})
    with watched(config, world) as world:
        return _prepared(config, world)


def _prepared(config: TrainConfig, world: World) -> Outcome:
    """Find the data, the model, the folder and what to go on from, then train."""
    factors = together(world, lambda: parse_slow(config.slow, world.size, least=1))
    together(world, lambda: check_tensorboard(config.tensorboard))
    dataset, batches, model = together(world, lambda: prepare(config, world))
    held_out = together(world, lambda: verification(config, dataset, world))
    folder = together(world, lambda: RunFolder(config) if world.rank == 0 else None)
    try:
        found = world.gather(together(world, lambda: find(config) if world.rank == 0 else None))[0]
        with read_ranks(found, world) if found is not None else nullcontext() as source:
            if source is not None:
                check_run(found, source.facts, config, dataset)
            return _train(config, world, dataset, batches, model, held_out, folder, source, factors)
    finally:
        if folder is not None:
            folder.close()


def _train(
    config: TrainConfig,
    world: World,
    dataset: Dataset,
    batches: Loader,
    model: nn.Module,
    verification: tuple[torch.Tensor, torch.Tensor] | None,
    folder: RunFolder | None,
    source: Reading | None,
    slow: tuple[float, ...],
) -> Outcome:
    seed = config.seed + 1 + world.rank  # dropout and the like differ between ranks
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    mode = make_mode(config, model, world)
    survival = Survival(mode, world) if launched.survives() and world.size > 1 else None
    if survival is not None:
        world = survival.world
    with ExitStack() as stack:
        with survival.starting() if survival is not None else nullcontext():
            path = Path(world.gather(str(folder.path) if folder is not None else "")[0])
            monitor = make_monitor(config, mode, path, len(batches))
            progress = stack.enter_context(Progress(config.epochs, len(batches), shown=world.rank == 0, monitor=monitor))
            run = Run(config, world, dataset, batches, model, mode, progress, folder, verification, survival)
            keeper = Keeper(run, folder)
            if source is not None:
                try:
                    keeper.restore(source)
                except UsageError:
                    mode.close()
                    raise
                progress.resumed(run.steps, sum(death["updates"] for death in run.deaths))
            run.earlier_deaths = launched.earlier_deaths(run.earlier_deaths)
            if config.resume is not None:
                rows = source.facts["rows"] if source is not None else []
                together(world, lambda: folder.begin(rows) if folder is not None else None)
            watch_run(mode, keeper, survival)
            if config.record:
                try:
                    run.begin_record(path, keeper)
                except UsageError:
                    mode.close()
                    raise
            if slow[world.rank] > 1:
                Slowdown(mode, slow[world.rank])
            if survival is not None and world.rank == 0:
                survival.told = progress.died
        stopped = run.epochs(keeper)
    if stopped:
        keeper.close()
        run.together(mode.close)
        if run.record is not None:
            run.record.close()
        about = {"epoch": run.epoch, "step": run.step, "checkpoint": keeper.newest, "restarts": keeper.restarts}
        return Outcome({"stopped": stopped, **about}, [], path, stopped)
    keeper.close()
    record = rank_record(mode, run.samples) | run.log.record()  # closing waits for the ranks that still evaluate
    ranks = run.together(lambda: _close(mode, record))
    world = run.world
    rule = make_rule(config.rule, config.options)
    result = result_of(config, rule, ranks, run.row, seconds=max(r["seconds"] for r in ranks), nodes=world.nodes)
    result |= {"resumed_from": keeper.resumed_from or None, "restarts": keeper.restarts}
    result["samples_per_second"] += sum(death["samples"] for death in run.deaths) / result["seconds"]
    if keeper.reset:
        result["reset"] = list(keeper.reset)
    if config.slow:
        result["artificially_slow"] = {str(rank): factor for rank, factor in enumerate(slow) if factor > 1}
    guided = run.guided
    if guided is not None:
        result["guided"] = run.together(lambda: guided_record(guided, run.world))
    if run.record is not None:
        result |= run.record.close(model)

    def finish() -> None:
        if survival is not None or run.deaths:
            result["deaths"] = run.deaths  # last: somebody may have died since the ranks' numbers were put together
        together(run.world, lambda: folder.finish(result, ranks, config, world) if folder is not None else None)

    run.together(finish)
    return Outcome(result, ranks, path)


def _close(mode: Mode, record: dict[str, Any]) -> list[dict[str, Any]]:
    mode.close()
    return mode.everyone.gather(record)
