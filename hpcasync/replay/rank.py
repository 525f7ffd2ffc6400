"""One rank of a replayed run: its copy of the model, its generators and buffers, and how far it has come."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcasync.data import Split
from hpcasync.kernels import all_finite
from hpcasync.modes.flat import flat_grad
from hpcasync.store import Layout, Worker
from hpcasync.train.record_file import RankRecord


@dataclass
class Rank:
    """Where the replay of one rank is.

    Attributes:
        record: what it did.
        worker: its view of the store.
        copy: float32 (layout.total,), its copy of the parameters.
        buffers: its own, of the model.
        randoms: states of the generators of torch, numpy and Python.
        at: the event that comes next, or is under way.
        todo: shards that the event under way has still to do; None before it has begun.
        grads: of the event under way.
        syncs: calls of ``synchronize`` that are over.
    """

    record: RankRecord
    worker: Worker
    copy: np.ndarray
    buffers: list[Tensor]
    randoms: tuple[Tensor, Any, Any]
    at: int = 0
    todo: list[int] | None = None
    grads: list[np.ndarray | None] = field(default_factory=list)
    syncs: int = 0

    @property
    def done(self) -> bool:
        """Whether all that was recorded has been done."""
        return self.at == len(self.record.events)

    @property
    def event(self) -> np.void:
        """The event that comes next, or is under way."""
        row: np.void = self.record.events[self.at]
        return row


@dataclass(frozen=True)
class Computed:
    """A gradient: per parameter flat or None, the loss, and whether it holds neither NaN nor infinity."""

    grads: list[np.ndarray | None]
    loss: float
    finite: bool


class Gradients:
    """Computes the ranks' gradients with one model, as the live ranks computed them.

    Args:
        model: in training mode; its parameters are pointed elsewhere.
        layout: where each parameter lies in a copy.
        samples: of the training split.
    """

    def __init__(self, model: nn.Module, layout: Layout, samples: Split) -> None:
        self.model, self._layout, self._samples = model, layout, samples
        self._names, self._params = zip(*model.named_parameters(), strict=True)
        self._buffers = list(model.buffers())

    def __call__(self, rank: Rank, indices: np.ndarray) -> Computed:
        """The gradient at the rank's copy, on the samples ``indices``; its buffers and generators go on."""
        self.load(rank)
        torch.set_rng_state(rank.randoms[0])
        np.random.set_state(rank.randoms[1])
        random.setstate(rank.randoms[2])
        x, y = self._samples.batch(indices)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        rank.randoms = torch.get_rng_state(), np.random.get_state(), random.getstate()
        for mine, used in zip(rank.buffers, self._buffers, strict=True):
            mine.copy_(used)
        grads = [flat_grad(p, n) for p, n in zip(self._params, self._names, strict=True)]
        finite = all([g is None or all_finite(g) for g in grads])
        return Computed(grads, loss.item(), finite)

    def load(self, rank: Rank) -> nn.Module:
        """The model with the rank's parameters (views of its copy) and buffers, without gradients."""
        flat = torch.from_numpy(rank.copy)
        for p, start, size in zip(self._params, self._layout.starts, self._layout.sizes, strict=True):
            p.data = flat[start : start + size].view(p.shape)
            p.grad = None
        for used, mine in zip(self._buffers, rank.buffers, strict=True):
            used.copy_(mine)
        return self.model


def start_randoms(record: RankRecord, seed: int) -> tuple[Tensor, Any, Any]:
    """The states of a rank's generators when its first step began; the caller's stay as they are."""
    kept = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    found = torch.from_numpy(record.random.copy()), np.random.get_state(), random.getstate()
    np.random.set_state(kept[0])
    random.setstate(kept[1])
    return found


def average_buffers(ranks: list[Rank], recorded: list[np.ndarray] | None = None) -> None:
    """What ``hpcasync.modes.buffers`` does for the live ranks.

    Args:
        ranks: that meet.
        recorded: what came of it, where that depended on a death.
    """
    for i, mine in enumerate(zip(*(rank.buffers for rank in ranks), strict=True)):
        if recorded:
            mean = torch.from_numpy(recorded[i])
        elif mine[0].is_floating_point():
            total = torch.zeros_like(mine[0], dtype=torch.float64)
            for buffer in mine:
                total += buffer
            mean = total / len(mine)
        else:
            mean = mine[0]
        for buffer in mine:
            buffer.copy_(mean)
