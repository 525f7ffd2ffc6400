"""The shards as a torch sampler, for users who bring their own ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch.utils.data

from hpcasync.data.partition import World, bounds, check_number, ranks, shard


class ShardSampler(torch.utils.data.Sampler[int]):
    """This rank's samples, the same number on every rank, drawn anew every epoch.

    A rank whose shard is one short repeats its own first sample, so that no rank makes fewer steps than
    another. After each full pass the epoch advances by itself; `set_epoch` sets it.

    Args:
        source: the number of samples, or anything with a length.
        world: has ``rank`` and ``size``; None is one rank.
        seed: of the order.
        shuffle: False keeps the stored order.

    Raises:
        UsageError: fewer samples than ranks, or a bad argument.
    """

    def __init__(
        self, source: int | Sized, world: World | None = None, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.n = check_number("number of samples", source if isinstance(source, int) else len(source), 1)
        self.rank, self.size = ranks(world)
        self.seed = check_number("seed", seed, 0)
        self.shuffle = shuffle
        self.epoch = 0
        bounds(self.n, self.rank, self.size)

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def __iter__(self) -> Iterator[int]:
        own = shard(self.n, self.rank, self.size, self.epoch, self.seed, shuffle=self.shuffle).tolist()
        yield from own
        if len(own) < len(self):
            yield own[0]
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, from 0."""
        self.epoch = check_number("epoch", epoch, 0)
