"""The states of all ranks in one checkpoint file: rank 0 writes and reads it, the others send and receive in pieces.

So the file system need not be shared by the nodes, no rank but 0 depends on it, and rank 0 holds one piece of another rank's
arrays at a time. Arrays that are equal, on one rank or on several, are stored once: the other names are HDF5 hard links.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcasync.comm import World
from hpcasync.comm.star import RankDied
from hpcasync.errors import UsageError
from hpcasync.train.checkpoint_file import reading, writing
from hpcasync.train.checkpoint_tree import Arrays, pack, unpack

PIECE = 1 << 24
"""Bytes per message, and per write."""

Entry = tuple[str, str, tuple[int, ...], str]
"""An array to be stored: name, dtype, shape, SHA-256 of its bytes."""


def write_ranks(path: Path, world: World, facts: dict[str, Any], shared: Any, own: Any) -> None:
    """Write one file with ``facts``, the shared state and every rank's own. Collective.

    Args:
        path: the final name, only used on rank 0.
        world: the ranks.
        facts: small, plain; of rank 0.
        shared: tree of rank 0.
        own: tree of this rank.

    Raises:
        UsageError: the same on every rank: no space, no permission, or something in a state that can't be stored.
    """
    plain: Any = None
    arrays: Arrays = {}
    problem: str | None = None
    failure: Exception | None = None
    try:
        plain, arrays = pack(own, f"ranks/{world.rank}")
        if world.rank == 0:
            plain_shared, arrays_shared = pack(shared)
            facts = {**facts, "shared": plain_shared}
            arrays = arrays_shared | arrays
    except UsageError as error:
        problem = str(error)
    listed = world.within(_gather, world, (problem, plain, [_entry(name, a) for name, a in arrays.items()]))
    if listed is not None:
        problem = next((p for p, _, _ in listed if p is not None), None)
    if listed is None:
        world.within(_send_wanted, world, arrays)
    else:
        wanted, links = _plan([entries for _, _, entries in listed] if problem is None else [[] for _ in listed])
        if world.comm is not None:
            world.within(world.comm.scatter, [[name for name, *_ in entries] for entries in wanted])
        pieces = _pieces(world, arrays, wanted)
        try:
            if problem is None:
                needed = sum(_bytes(entry) for entries in wanted for entry in entries)
                with writing(path, needed) as file:
                    _store(file, pieces, wanted, links)
                    _store_text(file, "facts", facts | {"ranks": world.size})
                    for rank, (_, theirs, _) in enumerate(listed):
                        _store_text(file, f"ranks/{rank}/state", theirs)
        except (UsageError, RankDied) as error:  # of a death the others hear in what comes next
            problem = str(error)
        except Exception as error:
            failure = error
        for _ in pieces:  # nobody may be left sending
            pass
        if failure is not None:
            raise failure  # ends the job
    problem = problem if world.comm is None else world.within(world.comm.bcast, problem)
    if problem is not None:
        raise UsageError(problem)


class Reading:
    """An open checkpoint. All methods are collective unless they say otherwise.

    Attributes:
        facts: what ``write_ranks`` was given, on every rank.
        ranks: number of ranks of the job that made it.
        alone: the rank that saved its own state only, since the others could not be reached; None for a whole checkpoint.
    """

    def __init__(self, world: World, path: Path, file: h5py.File | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        alone = facts.get("alone")
        self.alone = None if alone is None else int(alone["rank"])
        self._states = int(facts["ranks"])
        self.ranks = self._states if alone is None else int(alone["of"])
        self._world, self._file = world, file

    def same(self, ranks: int) -> bool:
        """Whether so many ranks can go on as those that made it: each with its own state, inside the epoch. Not collective."""
        return self.ranks == ranks and not self.facts.get("dead")

    def shared(self) -> Any:
        """The shared tree on rank 0, None on the others. Not collective."""
        return None if self._file is None else unpack(self.facts["shared"], self._array)

    def own(self) -> Any:
        """The tree of this rank: that of rank ``r % ranks`` of those that made the checkpoint, or of the one that did."""
        world = self._world
        if self._file is not None:
            for rank in range(1, world.size):
                self._send(rank, rank % self._states)
            return unpack(_text(self._file, "ranks/0/state"), self._array)
        return unpack(world.within(world.comm.recv), lambda name: world.within(self._receive))

    def mean(self, of: str) -> dict[str, np.ndarray]:
        """Per name the mean of arrays ``ranks/<every rank>/<of>/<name>``, in float64, cast back; on every rank."""
        world, file = self._world, self._file
        names = sorted(file[f"ranks/0/{of}"]) if file is not None else []
        names = world.within(world.comm.bcast, names) if world.comm is not None else names
        means = {}
        for name in names:
            mean: Any = None
            if file is not None:
                parts = [self._array(f"ranks/{r}/{of}/{name}") for r in range(self._states)]
                mean = np.mean([p.astype(np.float64) for p in parts], axis=0).astype(parts[0].dtype)
            means[name] = world.within(world.comm.bcast, mean) if world.comm is not None else mean
        return means

    def _array(self, name: str) -> np.ndarray:
        assert self._file is not None
        return np.asarray(self._file[name][()])

    def _send(self, rank: int, source: int) -> None:
        assert self._file is not None
        comm = self._world.comm
        plain = _text(self._file, f"ranks/{source}/state")
        comm.send(plain, dest=rank)

        def send(name: str) -> np.ndarray:
            array = self._array(name)
            comm.send((array.dtype.str, array.shape), dest=rank)
            for index, _ in _slabs(array.shape, array.itemsize):
                comm.Send(_raw(array[index]), dest=rank)
            return array

        unpack(plain, send)

    def _receive(self) -> np.ndarray:
        comm = self._world.comm
        dtype, shape = comm.recv(source=0)
        array = np.empty(shape, dtype)
        for index, _ in _slabs(shape, array.itemsize):
            comm.Recv(_raw(array[index]), source=0)
        return array


@contextmanager
def read_ranks(path: Path, world: World) -> Iterator[Reading]:
    """Open a checkpoint for all ranks. Collective.

    Raises:
        UsageError: the same on every rank: not there, damaged, or of a newer format.
    """
    if world.rank:
        problem, facts = world.within(world.comm.bcast, None)
        if problem is not None:
            raise UsageError(problem)
        yield Reading(world, path, None, facts)
        return
    try:
        source = reading(path)
        file = source.__enter__()
    except UsageError as error:
        if world.comm is not None:
            world.comm.bcast((str(error), None), root=0)
        raise
    try:
        facts = _text(file, "facts")  # after the checksum nothing is wrong with it
        if world.comm is not None:
            world.comm.bcast((None, facts), root=0)
        yield Reading(world, path, file, facts)
    finally:
        source.__exit__(None, None, None)


def facts_of(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, by one process alone.

    Raises:
        UsageError: as ``read_ranks``.
    """
    with reading(path) as file:
        found: dict[str, Any] = _text(file, "facts")
        return found


def _gather(world: World, value: Any) -> list[Any] | None:
    return [value] if world.comm is None else world.comm.gather(value, root=0)


def _entry(name: str, array: np.ndarray) -> Entry:
    return name, array.dtype.str, array.shape, hashlib.sha256(_raw(array).data).hexdigest()


def _bytes(entry: Entry) -> int:
    _, dtype, shape, _ = entry
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _plan(listed: list[list[Entry]]) -> tuple[list[list[Entry]], list[tuple[str, str]]]:
    """What each rank sends, and the other names of what is stored already."""
    first: dict[tuple[Any, ...], str] = {}
    wanted: list[list[Entry]] = []
    links = []
    for entries in listed:
        wanted.append([])
        for entry in entries:
            name = first.setdefault(entry[1:], entry[0])
            if name == entry[0]:
                wanted[-1].append(entry)
            else:
                links.append((entry[0], name))
    return wanted, links


def _send_wanted(world: World, arrays: Arrays) -> None:
    for name in world.comm.scatter(None, root=0):
        for index, _ in _slabs(arrays[name].shape, arrays[name].itemsize):
            world.comm.Send(_raw(arrays[name][index]), dest=0)


def _pieces(world: World, arrays: Arrays, wanted: list[list[Entry]]) -> Iterator[tuple[Any, np.ndarray]]:
    """The values of all arrays in the order of ``wanted``, piece by piece; rank 0 receives those of the others."""
    for rank, entries in enumerate(wanted):
        for name, dtype, shape, _ in entries:
            for index, size in _slabs(shape, np.dtype(dtype).itemsize):
                if rank == 0:
                    yield index, arrays[name][index]
                    continue
                piece = np.empty(size, dtype)
                world.within(world.comm.Recv, _raw(piece), rank)
                yield index, piece


def _store(
    file: h5py.File,
    pieces: Iterator[tuple[Any, np.ndarray]],
    wanted: list[list[Entry]],
    links: list[tuple[str, str]],
) -> None:
    for name, dtype, shape, _ in [entry for entries in wanted for entry in entries]:
        data = file.create_dataset(name, shape, np.dtype(dtype), fillvalue=None)
        for _ in _slabs(shape, data.dtype.itemsize):
            index, piece = next(pieces)
            data[index] = piece
    for name, target in links:
        file[name] = file[target]


def _slabs(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Contiguous pieces of a C-ordered array of at most ``PIECE`` bytes: index and shape of each."""
    if not shape:
        yield ..., ()
        return
    row = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    if row <= PIECE or len(shape) == 1:
        step = max(1, PIECE // max(1, row))
        for start in range(0, shape[0] if row else 0, step):
            stop = min(start + step, shape[0])
            yield (slice(start, stop),), (stop - start, *shape[1:])
        return
    for i in range(shape[0]):
        for index, size in _slabs(shape[1:], itemsize):
            yield (i, *index), size


def _raw(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, without a copy."""
    flat: np.ndarray = np.asarray(array).reshape(-1).view(np.uint8)
    return flat


def _store_text(file: h5py.File, name: str, value: Any) -> None:
    """JSON as bytes; Python's form of it, with NaN and infinity."""
    file[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)


def _text(file: h5py.File, name: str) -> Any:
    return json.loads(file[name][()].tobytes())
