"""The loader: this rank's normalised batches, as many on every rank, resumable at any batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hpcasync.data.dataset import Dataset, open_dataset
from hpcasync.data.partition import World, bounds, check_number, ranks, shard
from hpcasync.data.partition_labels import Indices, check_parts, make_partition
from hpcasync.errors import UsageError


def loader(
    source: str | os.PathLike[str] | Dataset,
    world: World | None = None,
    *,
    batch: int = 64,
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
    partition: str | Sequence[Indices] = "iid",
) -> Loader:
    """Open ``source`` and return the `Loader` of this rank.

    Args:
        source: a known name, the path of a data set file, or an open `Dataset`.
        world: has ``rank`` and ``size``; None is one rank.
        batch: the largest number of samples in a batch of this rank.
        split: ``"train"`` or ``"test"``.
        seed: of the order.
        shuffle: False keeps the stored order.
        partition: what `make_partition` takes, drawn from ``seed``, or what it returned.

    Raises:
        UsageError: a bad source or argument, fewer samples than ranks, or a partition that does not fit.
    """
    dataset = open_dataset(source)
    return Loader(dataset, world, batch=batch, split=split, seed=seed, shuffle=shuffle, partition=partition)


class Loader:
    """Iterates over this rank's ``(x float32 normalised, y int64)`` batches of one epoch.

    Every rank gets the same number of batches, so that none waits for a collective that never comes: the
    number that the largest shard needs. Each shard is cut into that many pieces of nearly equal size, and
    every sample comes exactly once per epoch. One exception: with ``batch=1`` a rank whose shard is one short
    repeats its own first sample at the end.

    With a partition a rank only ever sees its own part. The number of batches stays that of equal shares, so an epoch is
    as long as without. A rank reads its part again and again, newly shuffled each time, and an epoch is the next stretch
    of one equal share: a small part comes several times in an epoch, a large one is finished in a later epoch, and within
    a rank the uses of any two samples never differ by more than one.

    After each full pass the epoch advances by itself; `set_epoch` sets it. Leaving a pass early and starting
    a new one begins the same epoch again; only `load_state_dict` continues in the middle.

    Attributes:
        taken: the samples of the batch handed out last.
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
        partition: str | Sequence[Indices] = "iid",
    ) -> None:
        self.dataset = dataset
        self.samples = dataset.as_torch(split)
        self.rank, self.size = ranks(world)
        self.batch = check_number("batch", batch, 1)
        self.seed = check_number("seed", seed, 0)
        self.shuffle = shuffle
        self.epoch = 0
        self.taken: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, np.int64)
        self._position = 0  # batches of this epoch already handed out
        self._resume = 0  # where the next pass starts: not 0 only after load_state_dict
        bounds(len(self.samples), self.rank, self.size)
        self.partition = partition
        self._part = self._own_part()

    def _own_part(self) -> Indices | None:
        """This rank's part, None for equal shares drawn anew every epoch."""
        given = self.partition
        if isinstance(given, str) and given.strip().lower() == "iid":
            return None
        return self._parts()[self.rank]

    def _parts(self) -> Sequence[Indices]:
        """The part of every rank."""
        given, size = self.partition, self.size
        if isinstance(given, str):
            args: dict[str, Any] = {"split": self.samples.split, "batch": self.batch}
            return make_partition(given, self.dataset, size, self.seed, **args)
        if len(given) != size:
            raise UsageError(f"partition has {len(given)} parts, expected one for each of {size} ranks")
        parts = [np.asarray(p, np.int64).reshape(-1) for p in given]
        check_parts("partition", parts, len(self.samples), self.batch)
        return parts

    def among(self, living: Sequence[int]) -> Loader:
        """The loader of the same rank after others have died, from the same epoch on.

        Without a partition the samples are dealt to the living; with one each keeps its part, and takes an equal share of
        the parts of the dead.

        Args:
            living: ranks that are left of this loader's, in the order of their new numbers.
        """
        partition = self.partition
        if self._part is not None:
            parts = self._parts()
            gone = [parts[rank] for rank in range(self.size) if rank not in living]
            shares = np.array_split(np.concatenate(gone), len(living))
            partition = [np.concatenate([parts[rank], share]) for rank, share in zip(living, shares, strict=True)]
        place: Any = SimpleNamespace(rank=list(living).index(self.rank), size=len(living))
        given: dict[str, Any] = {"batch": self.batch, "split": self.samples.split, "seed": self.seed, "shuffle": self.shuffle}
        left = Loader(self.dataset, place, partition=partition, **given)
        left.epoch = self.epoch
        return left

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        largest = -(-len(self.samples) // self.size)
        return -(-largest // self.batch)

    def indices(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The samples of each batch of the current epoch."""
        steps = len(self)
        if self._part is None:
            own = shard(len(self.samples), self.rank, self.size, self.epoch, self.seed, shuffle=self.shuffle)
        else:
            own = self._stretch(self._part, -(-len(self.samples) // self.size))
        if len(own) < steps:
            own = np.append(own, own[0])
        return [own[i * len(own) // steps : (i + 1) * len(own) // steps] for i in range(steps)]

    def _stretch(self, part: Indices, share: int) -> Indices:
        """The next ``share`` samples of the endless row of shuffles of ``part``."""
        start = self.epoch * share
        first, last = start // len(part), (start + share - 1) // len(part)
        # Each pass has a generator of its own, so that the passes of earlier epochs need not be drawn again.
        row = [
            np.random.default_rng([self.seed, self.rank, turn]).permutation(part) if self.shuffle else part
            for turn in range(first, last + 1)
        ]
        return np.concatenate(row)[start - first * len(part) :][:share]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += self._done()
        self._position, self._resume = self._resume, 0
        for indices in self.indices()[self._position :]:
            x, y = self.samples.batch(indices)
            # Before the yield: a state saved after this batch was used is after this batch.
            self._position += 1
            self.taken = indices
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
            "part": self._digest(),
        }

    def _digest(self) -> str:
        """Names this rank's part; empty without a partition."""
        return "" if self._part is None else hashlib.sha256(self._part.astype("<i8").tobytes()).hexdigest()[:16]

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
        self._part = self._own_part()  # drawn from the seed
        if at and state.get("part", "") != self._digest():
            raise UsageError(
                "loader state is inside an epoch of another partition; resume with the same, or set the state's batch to 0 "
                "to repeat the epoch"
            )
        self._position = self._resume = at
