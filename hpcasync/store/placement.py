"""Which node owns which shard, and where in its memory everything of a shard lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hpcasync.kernels import HYPER
from hpcasync.store.layout import ALIGN, SHARD_ELEMENTS, Layout, Shard

LINE = 8
"""int64 words per cache line."""

WIDTH = len(HYPER) + 1
"""float64 words per parameter in a sender's table: the hyper-parameters, and whether there is a gradient."""


@dataclass(frozen=True)
class Port:
    """A process that holds the memory of some shards, and is the target of all operations on them.

    Attributes:
        rank: in the window's communicator.
        node: its node.
        shards: first and last + 1 of its shards, in the order of the whole layout.
        start: first element of its shards in the flat state.
        stop: last + 1.
        senders: the workers of all other nodes, which have a slot here.
    """

    rank: int
    node: int
    shards: tuple[int, int]
    start: int
    stop: int
    senders: tuple[int, ...]

    def layout(self, whole: Layout) -> Layout:
        """The layout of its shards alone; element 0 is the first of its own."""

        def moved(shard: Shard) -> Shard:
            pieces = tuple(replace(p, start=p.start - self.start) for p in shard.pieces)
            return Shard(shard.start - self.start, shard.stop - self.start, pieces)

        shards = tuple(moved(s) for s in whole.shards[slice(*self.shards)])
        return Layout(whole.sizes, whole.starts, self.stop - self.start, shards)


def place(layout: Layout, holders: Sequence[tuple[int, int]], workers: Sequence[int]) -> list[Port]:
    """Deal the shards out to the nodes in contiguous runs of equal number, and within a node to its holders.

    Args:
        layout: of the whole state.
        holders: (rank, node) of each process that may hold shards.
        workers: node of each worker.

    Returns:
        The ports in the order of their shards; holders without a shard have none.
    """
    count = len(layout.shards)
    by_node: dict[int, list[int]] = {}
    for rank, node in holders:
        by_node.setdefault(node, []).append(rank)
    nodes = sorted(by_node)
    ports = []
    for i, node in enumerate(nodes):
        first, last = count * i // len(nodes), count * (i + 1) // len(nodes)
        ranks = by_node[node]
        for j, rank in enumerate(ranks):
            lo = first + (last - first) * j // len(ranks)
            hi = first + (last - first) * (j + 1) // len(ranks)
            if lo < hi:
                senders = tuple(w for w, theirs in enumerate(workers) if theirs != node)
                ports.append(Port(rank, node, (lo, hi), layout.shards[lo].start, layout.shards[hi - 1].stop, senders))
    return ports


def shard_size(sizes: Sequence[int], nodes: int) -> int:
    """Elements per shard so that every node has one, where there are enough elements."""
    total = sum(-(-size // ALIGN) * ALIGN for size in sizes)
    return max(ALIGN, min(SHARD_ELEMENTS, total // nodes))


@dataclass(frozen=True)
class Segment:
    """Byte offsets in a port's memory.

    In order: the clocks of all workers (first port only), a line per shard, and for each sender a word per shard that
    numbers its requests and one that numbers the answers, a line per shard in the answers, a table of hyper-parameters, a
    block per shard (a line, then the gradient), the parameters it gets back, its private vectors; last the state.

    Attributes:
        shards: elements of each shard.
        senders: number of slots.
        params: number of parameters of the model.
        rows: rows of the state: ``w`` and the rule's vectors.
        private: private vectors per worker.
        workers: number of workers, 0 on all ports but the first.
    """

    shards: tuple[int, ...]
    senders: int
    params: int
    rows: int
    private: int
    workers: int

    @property
    def total(self) -> int:
        """Elements of the port's shards."""
        return sum(self.shards)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First byte of each part, and ``"end"``; each part begins on a cache line."""
        count, line = len(self.shards), 8 * LINE
        sizes = {
            "clocks": 16 * self.workers,
            "excused": 16 * self.workers,
            "lines": line * count,
            "requests": 8 * self.senders * count,
            "done": 8 * self.senders * count,
            "answers": line * self.senders * count,
            "tables": 8 * WIDTH * self.params * self.senders,
            "blocks": self.block_bytes * self.senders,
            "outs": 4 * self.total * self.senders,
            "privates": 4 * self.private * self.total * self.senders,
            "state": 4 * self.rows * self.total,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // line) * line
        return offsets | {"end": at}

    @property
    def block_bytes(self) -> int:
        """Bytes of one sender's blocks."""
        return 8 * LINE * len(self.shards) + 4 * self.total

    def block(self, sender: int, shard: int) -> int:
        """First byte of a sender's block of a shard (counted in the port)."""
        before = 8 * LINE * shard + 4 * sum(self.shards[:shard])
        return self.offsets["blocks"] + self.block_bytes * sender + before

    def word(self, name: str, sender: int, shard: int = 0) -> int:
        """Byte of a sender's word of a shard in ``"requests"`` or ``"done"``."""
        return self.offsets[name] + 8 * (len(self.shards) * sender + shard)

    def out(self, sender: int, element: int = 0) -> int:
        """Byte of an element (counted in the port) in what a sender gets back."""
        return self.offsets["outs"] + 4 * (self.total * sender + element)


def segments_of(layout: Layout, ports: Sequence[Port], rows: int, private: int, workers: int) -> list[Segment]:
    """Where things lie in each port's memory; the clocks are in the first one's."""
    sizes = [tuple(s.stop - s.start for s in layout.shards[slice(*p.shards)]) for p in ports]
    return [
        Segment(size, len(port.senders), len(layout.sizes), rows, private, 0 if i else workers)
        for i, (port, size) in enumerate(zip(ports, sizes, strict=True))
    ]
