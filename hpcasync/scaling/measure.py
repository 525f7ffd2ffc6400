"""Samples per second of one case, over a stretch of time without evaluation; and the time to an accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hpcasync.comm import World, raise_together
from hpcasync.data import Loader
from hpcasync.errors import UsageError
from hpcasync.modes import Mode
from hpcasync.modes.local import torch_optimizer
from hpcasync.rules import make_rule
from hpcasync.scaling.cases import BASE, Case
from hpcasync.stats import Staleness, TimeShare
from hpcasync.train.config import TrainConfig
from hpcasync.train.evaluate import evaluate
from hpcasync.train.prepare import make_mode, prepare
from hpcasync.train.slow import Slowdown

WARM_UP = 5
"""Steps of every rank before the clock runs, and again as many to find out how long one lasts."""
EVALUATIONS = 8
"""Per epoch, while the time to an accuracy is measured."""

Batch = tuple[torch.Tensor, torch.Tensor]


def check(world: World, case: Case) -> None:
    """Build what a case needs, and nothing more: bad input is found before anything is measured. Collective.

    Raises:
        UsageError: on every rank, if one found it.
    """
    problem, made = None, None
    try:
        made = prepare(case.config, world)
    except UsageError as error:
        problem = f"{case.kind} {case.name}: {error}"
    raise_together(world, problem)
    assert made is not None
    if case.name != BASE:
        make_mode(case.config, made[2], world).close()


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
            every = _every(case.config)
            step = _stepper(batches, model, mode, world)
            samples, spent = _run(world, step, mode.share, seconds, in_step=case.config.mode != "async", every=every)
            staleness = mode.staleness
            mode.synchronize()
    return _summary(world.gather((samples, *spent, staleness.counts)))


def seconds_to(world: World, config: TrainConfig, target: float, *, seed: int = 0, factor: float = 1.0) -> dict[str, float]:
    """Train until an evaluation finds ``target``, no longer than the epochs of ``config``. Collective.

    The ranks meet for `EVALUATIONS` evaluations per epoch, in modes kstep and hierarchical after whole averages. The clock stands
    during evaluations.

    Args:
        world: the ranks.
        config: of the training.
        target: accuracy on the test split, in (0, 1].
        seed: of the model's start and the order of the data.
        factor: this rank computes so many times longer, see `Slowdown`.

    Returns:
        On every rank ``to_target``, seconds, and ``epochs_to_target``, passes over the training data until then, both NaN if
        it was not reached; ``accuracy``, the last one found.
    """
    config = replace(config, seed=seed)
    dataset, batches, model = prepare(config, world)
    with make_mode(config, model, world) as mode:
        if factor > 1:
            Slowdown(mode, factor)
        every = _every(config)
        stretch = -(-len(batches) // EVALUATIONS // every) * every
        step, steps, samples, accuracy = _stepper(batches, model, mode, world), config.epochs * len(batches), 0, 0.0
        for done in range(0, steps, stretch):
            mode.share.start()
            samples += sum(step() for _ in range(min(stretch, steps - done)))
            mode.synchronize()
            _, accuracy = evaluate(model, dataset, world)
            if accuracy >= target:
                ranks = world.gather((samples, mode.share.seconds))
                epochs = sum(count for count, _ in ranks) / len(dataset.as_torch("train"))
                return {"to_target": max(s for _, s in ranks), "epochs_to_target": epochs, "accuracy": accuracy}
    return {"to_target": math.nan, "epochs_to_target": math.nan, "accuracy": accuracy}


def _every(config: TrainConfig) -> int:
    """Steps from one average of models to the next, 1 where there are none."""
    return config.every if config.mode in ("kstep", "hierarchical") and isinstance(config.every, int) else 1


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
    """Samples of this rank, and its seconds: all, compute, communicate (copies to and from a GPU included), wait."""
    for _ in range(WARM_UP):
        step()
    began = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    pace = max(world.gather((time.perf_counter() - began) / WARM_UP))
    steps = -(-max(1, round(seconds / pace)) // every) * every if in_step else math.inf
    world.collectives.barrier()
    share.start()
    before = share.seconds, share.compute, share.communicate + share.copy, share.wait
    began, done, samples = time.perf_counter(), 0, 0
    while done < steps and (in_step or time.perf_counter() - began < seconds):
        samples += step()
        done += 1
    after = share.seconds, share.compute, share.communicate + share.copy, share.wait
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
