"""The file of one rank's record: HDF5 whose arrays are laid out once and then written through a memory map.

After the layout nothing of HDF5 is touched while the run goes on: the file is a valid one at any time, and what a rank has
written stays there when the rank is killed. Rows count once ``counts`` says so. Schema: docs/replay.md.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcasync.data.atomic import replacing
from hpcasync.errors import UsageError, damaged
from hpcasync.modes.recorder import Event

FORMAT, VERSION = "hpcasync-record", 1
FOLDER = "record"
COUNTED = ("events", "steps", "samples", "hypers")
CLOSED = len(COUNTED)  # word of ``counts`` that says whether the run came to its end
BLOCK = 1 << 22
"""Bytes of disk that are asked for at a time: writing to a map whose disk is full would kill the rank."""

STEP = np.dtype(
    [
        ("start", "<f8"), ("end", "<f8"), ("compute", "<f4"), ("wait", "<f4"), ("apply", "<f4"), ("pull", "<f4"),
        ("loss", "<f8"), ("samples", "<i4"), ("first", "<i8"),
    ]
)  # fmt: skip
"""A row of ``steps``."""
STEP_ROW = struct.Struct("<ddffffdiq")
EVENT_ROW = struct.Struct("<BiIqqqddd")
"""A row of ``events`` up to its versions."""


def event_type(shards: int) -> np.dtype[Any]:
    """A row of ``events``."""
    return np.dtype(
        [
            ("kind", "<u1"), ("hyper", "<i4"), ("digest", "<u4"), ("step", "<i8"), ("batch", "<i8"), ("clock", "<i8"),
            ("begin", "<f8"), ("end", "<f8"), ("waited", "<f8"), ("versions", "<i8", (max(1, shards),)),
        ]
    )  # fmt: skip


def rank_path(run: Path, rank: int) -> Path:
    """Where the record of a rank lies in the folder of a run."""
    return run / FOLDER / f"rank-{rank:05d}.h5"


class RankFile:
    """The arrays of a rank's record, open for writing.

    Args:
        path: of the file; one that is there is replaced.
        sizes: rows of ``COUNTED`` at most.
        facts: kept as the JSON attribute ``facts``.
        arrays: small ones, kept as they are.
        shards: of the store.
        hyper: shape of a row of ``hypers``.

    Attributes:
        events, steps, samples, hypers: the arrays.
        event_bytes, step_bytes: the same as bytes, for ``EVENT_ROW`` and ``STEP_ROW``; ``versions``: that column of ``events``.
        counts: int64, the rows of each that count, then whether the record is closed.
        rows: the same rows as a list.

    Raises:
        UsageError: the file can't be made, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, int],
        facts: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        shards: int,
        hyper: tuple[int, ...],
    ) -> None:
        self.path, self._arrays = path, dict(arrays)
        types = {"events": event_type(shards), "steps": STEP, "samples": np.dtype("<i4"), "hypers": np.dtype("<f8")}
        types["counts"] = np.dtype("<i8")
        shapes: dict[str, tuple[int, ...]] = {name: (sizes[name],) for name in COUNTED}
        shapes["hypers"] += hyper
        shapes["counts"] = (CLOSED + 1,)
        offsets = {}
        self._about = {"format": FORMAT, "version": VERSION, "facts": json.dumps(facts)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # not truncated: an old record may still be mapped
            with h5py.File(path, "w", alignment_threshold=64, alignment_interval=64, libver="v110") as file:
                file.attrs.update(self._about)
                for name, values in arrays.items():
                    file[name] = values
                for name, shape in shapes.items():
                    kind = types[name]
                    offsets[name] = _lay_out(file, name, shape, kind), shape, kind
            self._file = os.open(path, os.O_RDWR)
            self._starts = {name: offset for name, (offset, _, _) in offsets.items()}
            self._ends = dict(self._starts)  # byte up to which there is disk
            self._reserve("counts", 8 * (CLOSED + 1))
            maps = {n: np.memmap(path, k, "r+", o, s) for n, (o, s, k) in offsets.items()}
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"can't write the record {path}: {why}; leave --record out, or make room") from error
        self._maps = maps
        self._row = {name: maps[name].strides[0] for name in COUNTED}
        # Plain views: indexing a memmap object costs several times more.
        self.events, self.steps, self.samples, self.hypers, self.counts = (
            maps[name].view(np.ndarray) for name in (*COUNTED, "counts")
        )
        # For rows in one call of ``struct``: an assignment to a structured array costs ten times as much.
        self.step_bytes, self.event_bytes = self.steps.view(np.uint8).data, self.events.view(np.uint8).data
        self.versions = self.events["versions"]
        self.rows = [0] * len(COUNTED)
        self._room = [0] * len(COUNTED)
        self.counts[:] = 0

    def count(self, which: int, rows: int) -> None:
        """So many rows of an array count now; they are all written."""
        self.rows[which] = rows
        self.counts[which] = rows

    def room(self, which: int, rows: int) -> bool:
        """Whether so many more rows of an array fit, on the disk too."""
        need = self.rows[which] + rows
        return need <= self._room[which] or self._make_room(which, need)

    def _make_room(self, which: int, need: int) -> bool:
        name = COUNTED[which]
        most = len(self._maps[name])
        if need > most:
            return False
        rows = min(most, need + BLOCK // self._row[name])
        try:
            self._reserve(name, rows * self._row[name])
        except OSError:
            return False
        self._room[which] = rows
        return True

    def flush(self) -> None:
        """Let the disk have everything."""
        for values in self._maps.values():
            values.flush()

    def rename(self, path: Path) -> None:
        """Give the file its final name."""
        os.replace(self.path, path)
        self.path = path

    def close(
        self, arrays: Mapping[str, np.ndarray] | None = None, facts: Mapping[str, Any] | None = None, *, ended: bool = True
    ) -> None:
        """Write the file anew without empty rows, compressed.

        Args:
            arrays: more of them, by their place in the file.
            facts: of the end.
            ended: whether the run came to its end.

        Raises:
            UsageError: no room for it, or its folder is not there; what has been recorded stays as it is.
        """
        self.counts[CLOSED] = ended
        image = io.BytesIO()  # HDF5 can't report a full disk cleanly
        with h5py.File(image, "w", libver="v110") as file:
            file.attrs.update(self._about)
            if facts is not None:
                file.attrs["end"] = json.dumps(facts)
            for name, values in self._arrays.items():
                file[name] = values
            for i, name in enumerate(COUNTED):
                rows = self._maps[name][: self.rows[i]]
                packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if len(rows) else {}
                file.create_dataset(name, data=rows, **packed)
            file["counts"] = self.counts
            for name, values in (arrays or {}).items():
                file[name] = values
        self.flush()
        with replacing(self.path, needed=image.tell()) as temporary:
            temporary.write_bytes(image.getbuffer())
        self.leave()

    def leave(self) -> None:
        """Give the maps back and leave the file as it is."""
        os.close(self._file)
        self._maps = {}
        self.counts = self.counts.copy()
        self.step_bytes = self.event_bytes = np.empty(0, np.uint8).data
        self.versions = np.empty((0, 0), np.int64)
        self.events = self.steps = self.samples = self.hypers = np.empty(0)

    def _reserve(self, name: str, size: int) -> None:
        start, end = self._ends[name], self._starts[name] + size
        if end > start:
            os.posix_fallocate(self._file, start, end - start)
            self._ends[name] = end


def _lay_out(file: h5py.File, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    """Make a contiguous data set whose bytes have their place in the file now; returns it. Holes take no disk."""
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind, logical=True), h5py.h5s.create_simple(shape), how)
    return int(made.get_offset())


@dataclass(frozen=True)
class RankRecord:
    """One rank's record as it was found, the rows that count.

    Attributes:
        rank: whose.
        facts: see docs/replay.md.
        events, steps, samples, hypers: see docs/replay.md; of a run that was killed, what was written until then.
        random: state of torch's generator at the start, uint8.
        closed: whether the run came to its end.
        final: the model at the end, by name; empty on other ranks than 0 and of a run that did not end.
        end: facts of the end.
        pending: a row of ``events`` or none: of a run that may outlive this rank, the push that it was in when it died.
        deaths: arrays that tell of the deaths of others, see docs/replay.md; of rank 0 only.
    """

    rank: int
    path: Path
    facts: dict[str, Any]
    events: np.ndarray
    steps: np.ndarray
    samples: np.ndarray
    hypers: np.ndarray
    random: np.ndarray
    closed: bool
    final: dict[str, np.ndarray]
    end: dict[str, Any]
    pending: np.ndarray
    deaths: dict[str, np.ndarray]

    @cached_property
    def versions(self) -> np.ndarray:
        """int64 (events, shards): of what this rank's copy is after each event."""
        rows: np.ndarray = self.events["versions"]
        return np.where(rows < 0, ~rows, rows)

    @cached_property
    def before(self) -> np.ndarray:
        """int64 (events, shards): the same before each event."""
        first = np.zeros((1, self.events["versions"].shape[1]), np.int64)
        return np.concatenate([first, self.versions])[:-1]

    def indices(self, step: int) -> np.ndarray:
        """The samples of the batch of a step, from 1."""
        row = self.steps[step - 1]
        return self.samples[row["first"] : row["first"] + row["samples"]].astype(np.int64)


def read_rank(path: Path, rank: int) -> RankRecord:
    """Read a rank's record.

    Raises:
        UsageError: no record of this format, or a damaged one.
    """
    with damaged(f"{path}: can't be read as a record", "it is damaged or no record"), h5py.File(path, "r", locking=False) as file:
        found = file.attrs.get("format")
        if found != FORMAT:
            raise UsageError(f"{path} is no record of hpcasync (its format is {found!r}, expected {FORMAT!r})")
        version = int(file.attrs["version"])
        if version != VERSION:
            raise UsageError(f"{path} has format {version}, this hpcasync reads {VERSION}; use the hpcasync that wrote it")
        counts = file["counts"][:]
        parts = {name: file[name][: int(counts[i])] for i, name in enumerate(COUNTED)}
        final, deaths = _arrays(file, "final"), _arrays(file, "deaths")
        pending = file["events"][len(parts["events"]) : len(parts["events"]) + 1]
        end = json.loads(file.attrs.get("end", "{}"))
        facts, random = json.loads(file.attrs["facts"]), file["random"][:]
        closed, _, _ = bool(counts[CLOSED]), int(facts["ranks"]), facts["run"]
        if facts.get("rank") != rank:
            raise UsageError(f"{path} is the record of rank {facts.get('rank')}, expected rank {rank}; was it renamed?")
        problem = _damage(**parts)
        if problem:
            raise UsageError(f"{path} is damaged: {problem}; copy it again")
        begun = not closed and facts.get("outlived") and (pending["kind"] == Event.PUSH).all()
        if not begun or _damage(**{**parts, "events": pending}):
            pending = pending[:0]
    about: dict[str, Any] = {"random": random, "closed": closed, "final": final, "end": end, "pending": pending, "deaths": deaths}
    return RankRecord(rank, path, facts, **parts, **about)


def _arrays(file: h5py.File, name: str) -> dict[str, np.ndarray]:
    return {key: np.asarray(data[()]) for key, data in file[name].items()} if name in file else {}


def _damage(events: np.ndarray, steps: np.ndarray, samples: np.ndarray, hypers: np.ndarray) -> str:
    """What in the tables points to something that is not there, empty if nothing does."""
    if ((steps["first"] < 0) | (steps["samples"] < 0) | (steps["first"] + steps["samples"] > len(samples))).any():
        return f"a step has samples beyond the {len(samples)} that there are"
    if ((events["batch"] < 0) | (events["batch"] > len(steps)) | (events["step"] < 0) | (events["step"] > len(steps))).any():
        return f"an event belongs to a step beyond the {len(steps)} that there are"
    if ((events["hyper"] < -1) | (events["hyper"] >= max(1, len(hypers)))).any():
        return f"a push has hyper-parameters beyond the {len(hypers)} that there are"
    return "" if np.isin(events["kind"], list(Event)).all() else "an event is of no known kind"


def read_record(run: Path) -> list[RankRecord]:
    """The records of all ranks of a run.

    Raises:
        UsageError: no such folder, no record in it, a rank's file missing, ranks of different runs.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: {'is a file' if run.exists() else 'no such folder'}; expected the folder of a run")
    there = sorted((run / FOLDER).glob("rank-*.h5"))
    if not there:
        raise UsageError(f"{run} holds no record ({FOLDER}/rank-*.h5); train with --record")
    first = read_rank(there[0], int(there[0].stem.removeprefix("rank-")))
    ranks = int(first.facts["ranks"])
    records = []
    for rank in range(ranks):
        path = rank_path(run, rank)
        if not path.exists():
            raise UsageError(f"{path} is missing: the run had {ranks} ranks, and each has a record; copy all of them")
        records.append(read_rank(path, rank))
        if records[-1].facts["run"] != records[0].facts["run"]:
            raise UsageError(f"{path} is of another run than {records[0].path}; copy the files of one run")
    return records
