"""The loader: this rank's normalised batches, as many on every rank, resumable at any batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hpcasync.data.dataset import Dataset, open_dataset
from hpcasync.data.partition import World, bounds, check_number, ranks, shard
from hpcasync.errors import UsageError


def loader(
    source: str | os.PathLike[str] | Dataset,
    world: World | None = None,
    *,
    batch: int = 64,
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
) -> Loader:
    """Open ``source`` and return the `Loader` of this rank.

    Args:
        source: a known name, the path of a data set file, or an open `Dataset`.
        world: has ``rank`` and ``size``; None is one rank.
        batch: the largest number of samples in a batch of this rank.
        split: ``"train"`` or ``"test"``.
        seed: of the order.
        shuffle: False keeps the stored order.

    Raises:
        UsageError: a bad source or argument, or fewer samples than ranks.
    """
    return Loader(open_dataset(source), world, batch=batch, split=split, seed=seed, shuffle=shuffle)


class Loader:
    """Iterates over this rank's ``(x float32 normalised, y int64)`` batches of one epoch.

    Every rank gets the same number of batches, so that none waits for a collective that never comes: the
    number that the largest shard needs. Each shard is cut into that many pieces of nearly equal size, and
    every sample comes exactly once per epoch. One exception: with ``batch=1`` a rank whose shard is one short
    repeats its own first sample at the end.

    After each full pass the epoch advances by itself; `set_epoch` sets it. Leaving a pass early and starting
    a new one begins the same epoch again; only `load_state_dict` continues in the middle.
    """

    def __init__(
        self,
        dataset: Dataset,
        world: World | None = None,
        *,
        batch: int = 64,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.dataset = dataset
        self.samples = dataset.as_torch(split)
        self.rank, self.size = ranks(world)
        self.batch = check_number("batch", batch, 1)
        self.seed = check_number("seed", seed, 0)
        self.shuffle = shuffle
        self.epoch = 0
        self._position = 0  # batches of this epoch already handed out
        self._resume = 0  # where the next pass starts: not 0 only after load_state_dict
        bounds(len(self.samples), self.rank, self.size)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        largest = -(-len(self.samples) // self.size)
        return -(-largest // self.batch)

    def indices(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The samples of each batch of the current epoch."""
        own = shard(len(self.samples), self.rank, self.size, self.epoch, self.seed, shuffle=self.shuffle)
        steps = len(self)
        if len(own) < steps:
            own = np.append(own, own[0])
        return [own[i * len(own) // steps : (i + 1) * len(own) // steps] for i in range(steps)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += self._done()
        self._position, self._resume = self._resume, 0
        for indices in self.indices()[self._position :]:
            x, y = self.samples.batch(indices)
            # Before the yield: a state saved after this batch was used is after this batch.
            self._position += 1
            yield x, y
        self.epoch += 1
        self._position = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, from 0; the resumed epoch keeps its position."""
        if check_number("epoch", epoch, 0) != self.epoch or self._done():
            self._position = self._resume = 0
        self.epoch = int(epoch)

    def _done(self) -> bool:
        """Whether the last batch was handed out, but the user left the pass before its end."""
        return self._position == len(self)

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch and next batch, with what the order depends on."""
        done = self._done()
        return {
            "epoch": self.epoch + done,
            "batch": 0 if done else self._position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": len(self.samples),
            "size": self.size,
            "batch_size": self.batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position: the next pass starts with the next batch of the saved epoch.

        Seed and order are taken over. Another number of ranks or another batch size can only start at the
        beginning of an epoch.

        Raises:
            UsageError: a state of other data, or a position inside an epoch with other ranks or batches.
        """
        missing = {"epoch", "batch", "seed", "shuffle", "samples", "size", "batch_size"} - state.keys()
        if missing:
            raise UsageError(f"loader state lacks {', '.join(sorted(missing))}; it is no state of a Loader")
        if state["samples"] != len(self.samples):
            raise UsageError(
                f"loader state is of {state['samples']} samples, but {self.dataset.path} has "
                f"{len(self.samples)}; resume with the same data"
            )
        at = check_number("batch in loader state", state["batch"], 0)
        for key, now in (("size", self.size), ("batch_size", self.batch)):
            if at and state[key] != now:
                raise UsageError(
                    f"loader state is inside an epoch with {key} {state[key]}, now it is {now}; resume "
                    "with the same, or set the state's batch to 0 to repeat the epoch"
                )
        if at >= len(self):
            raise UsageError(
                f"loader state is at batch {at}, but an epoch has {len(self)}; the state is damaged"
            )
        self.epoch = check_number("epoch in loader state", state["epoch"], 0)
        self.seed = check_number("seed in loader state", state["seed"], 0)
        self.shuffle = bool(state["shuffle"])
        self._position = self._resume = at
