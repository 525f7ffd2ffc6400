"""Samples per second of one case, over a stretch of time without evaluation; and the time to an accuracy."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hpcasync.comm import World
from hpcasync.data import Loader
from hpcasync.modes import Mode
from hpcasync.modes.local import torch_optimizer
from hpcasync.rules import make_rule
from hpcasync.scaling.cases import BASE, Case
from hpcasync.stats import Staleness, TimeShare
from hpcasync.train.config import TrainConfig
from hpcasync.train.loop import train
from hpcasync.train.plot import read_curves
from hpcasync.train.prepare import make_mode, prepare
from hpcasync.train.slow import Slowdown

WARM_UP = 5
"""Steps of every rank before the clock runs, and again as many to find out how long one lasts."""
Batch = tuple[torch.Tensor, torch.Tensor]


def throughput(world: World, case: Case, seconds: float, factor: float = 1.0) -> dict[str, Any]:
    """Measure a case. Collective.

    In mode async every rank steps until the time is over; ranks in step agree on a number of steps that lasts about as long.

    Args:
        world: the ranks.
        case: what to measure.
        seconds: how long.
        factor: this rank computes so many times longer, see `Slowdown`.

    Returns:
        On every rank ``samples_per_second`` of all ranks; ``own``, the sum of the ranks' own speeds: samples per second of
        computing, with nothing to wait for; ``compute``, ``communicate``, ``wait``, parts of the time; ``staleness``, mean.
    """
    _, batches, model = prepare(case.config, world)
    if case.name == BASE:
        optimizer = torch_optimizer(make_rule(case.config.rule, case.config.options), model)
        share, staleness = TimeShare(), Staleness()
        samples, spent = _run(world, _stepper(batches, model, optimizer, world), share, seconds, in_step=True)
    else:
        with make_mode(case.config, model, world) as mode:
            if factor > 1:
                Slowdown(mode, factor)
            every = case.config.every if isinstance(case.config.every, int) and case.config.mode != "async" else 1
            step = _stepper(batches, model, mode, world)
            samples, spent = _run(world, step, mode.share, seconds, in_step=case.config.mode != "async", every=every)
            staleness = mode.staleness
            mode.synchronize()
    return _summary(world.gather((samples, *spent, staleness.counts)))


def seconds_to(world: World, config: TrainConfig, target: float, *, seed: int = 0) -> dict[str, float]:
    """Train, and find the seconds of training after which an evaluation found ``target``. Collective.

    Returns:
        ``to_target``, seconds, NaN if it was not reached, and ``accuracy``, that of the end; on the other ranks NaN.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = world.gather(folder)[0]
        outcome = train(replace(config, output=output, seed=seed))
        found = {"to_target": math.nan, "accuracy": outcome.result["test_accuracy"]}
        if world.rank == 0:
            curves = read_curves(Path(output))
            there = np.flatnonzero(curves["test_accuracy"] >= target)
            if len(there):
                found["to_target"] = float(curves["seconds"][there[0]])
        world.collectives.barrier()
    return found


def _endless(batches: Loader) -> Iterator[Batch]:
    while True:
        yield from batches


def _stepper(
    batches: Loader, model: nn.Module, optimizer: torch.optim.Optimizer | Mode, world: World
) -> Callable[[], int]:
    stream = _endless(batches)

    def step() -> int:
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(world.device)), y.to(world.device)).backward()
        optimizer.step()
        return len(y)

    return step


def _run(
    world: World, step: Callable[[], int], share: TimeShare, seconds: float, *, in_step: bool, every: int = 1
) -> tuple[int, tuple[float, float, float, float]]:
    """Samples of this rank, and its seconds: all, compute, communicate, wait."""
    for _ in range(WARM_UP):
        step()
    began = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    pace = max(world.gather((time.perf_counter() - began) / WARM_UP))
    steps = -(-max(1, round(seconds / pace)) // every) * every if in_step else math.inf
    world.collectives.barrier()
    share.start()
    before = share.seconds, share.compute, share.communicate, share.wait
    began, done, samples = time.perf_counter(), 0, 0
    while done < steps and (in_step or time.perf_counter() - began < seconds):
        samples += step()
        done += 1
    after = share.seconds, share.compute, share.communicate, share.wait
    share.stop()
    whole, compute, communicate, wait = (b - a for a, b in zip(before, after, strict=True))
    return samples, (whole, compute, communicate, wait)


def _summary(ranks: list[tuple[Any, ...]]) -> dict[str, Any]:
    samples, whole, compute, communicate, wait = (np.array(column) for column in list(zip(*ranks, strict=True))[:5])
    staleness = Staleness()
    for rank in ranks:
        staleness = staleness.merge(Staleness(rank[5]))
    parts = {"compute": compute, "communicate": communicate, "wait": wait}
    return {
        "samples_per_second": float(samples.sum() / whole.max()),
        "own": float((samples / compute).sum()),
        "by_rank": [float(s / w) for s, w in zip(samples, whole, strict=True)],
        **{name: float(np.mean(part / whole)) for name, part in parts.items()},
        "staleness": staleness.summary()["mean"],
    }
