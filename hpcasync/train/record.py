"""Records a run while it goes on: what every rank did and when, enough to replay an asynchronous one bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hpcasync.comm import raise_together
from hpcasync.errors import UsageError
from hpcasync.kernels import HYPER
from hpcasync.modes import Async
from hpcasync.modes.batch_memory import most_replays
from hpcasync.modes.recorder import Event
from hpcasync.train.code_version import code_version
from hpcasync.train.record_deaths import MeetingsAtDeaths, torn_arrays
from hpcasync.train.record_file import COUNTED, EVENT_ROW, STEP_ROW, RankFile, rank_path, read_rank

if TYPE_CHECKING:
    from pathlib import Path

    from hpcasync.train.run import Run

EVENTS, STEPS, SAMPLES, HYPERS = range(len(COUNTED))
_GRADIENTS = (Event.PUSH, Event.SKIP, Event.DISCARD)
_PULLS = (Event.SKIP, Event.DISCARD, Event.GATE)
_QUIET = (Event.GATE, Event.TURN)  # not recorded where nothing came of it


class Record:
    """Records one rank of a run; costs 5 to 20 microseconds per step. The constructor is collective.

    Rows are written through a memory map, so that a rank that is killed leaves all it has written. What does not fit on the
    disk ends the record with a warning, not the run.

    Args:
        run: about to make its first step.
        folder: of the run.
        resumed: what ``state_dict`` gave on this rank when the checkpoint was made, None for a fresh run.

    Raises:
        UsageError: the same on every rank: a file can't be made; or the run that goes on has no record on some rank.
    """

    def __init__(self, run: Run, folder: Path, resumed: dict[str, Any] | None = None) -> None:
        mode, world = run.mode, run.world
        self._run, self._share, self._guided = run, mode.share, run.guided
        self._full = False
        layout = mode.store.layout if isinstance(mode, Async) and mode.mode == "async" else None
        self._read = mode._worker.read if isinstance(mode, Async) and layout is not None else np.zeros(1, np.int64)
        self._last = np.zeros_like(self._read)  # as in the last event
        self._params = [[p.param for p in s.pieces] for s in layout.shards] if layout is not None else []
        sizes = [len(group["params"]) for group in mode.param_groups]
        self._group_starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._hypers: list[bytes] = []
        self._batch = (0, 0)  # size, and where in the samples
        self._pushed: tuple[int, np.ndarray | None] = (0, None)  # clock, shards that were only read
        self._outlived = run.survival is not None
        self._meetings = MeetingsAtDeaths(run) if self._outlived and world.rank == 0 else None
        path, problem, kept = rank_path(folder, world.rank), None, None
        offsets = world.gather((world.node, time.time() - time.perf_counter(), uuid.uuid4().hex))
        token, epoch = offsets[0][2], next(offset for node, offset, _ in offsets if node == world.node)
        try:
            if resumed is not None:
                kept = read_rank(path, world.rank)
            arrays = {"random": torch.get_rng_state().numpy() if kept is None else kept.random}
            facts = self._facts(token, epoch) if kept is None else kept.facts
            self._shift = epoch - facts["epoch_of_times"]  # from this process's clock to that of the record's first rows
            new = path.with_suffix(".new")
            self.file = RankFile(new, self._most(), facts, arrays, len(self._params), (len(sizes), len(HYPER)))
            self._event_size = self.file.events.itemsize
            if kept is not None and resumed is not None:
                self._keep(kept, resumed["counts"])
                if self._meetings is not None:
                    events = self.file.events[: self.file.rows[EVENTS]]
                    self._meetings.number = int((events["kind"] == Event.SYNC).sum())
        except UsageError as error:
            problem = str(error)
        raise_together(world, problem)
        self.file.rename(path)  # only now: what a run goes on from is kept until all ranks have it
        if isinstance(mode, Async) and layout is not None:
            mode.recorder = self
            if self._outlived:
                mode._worker.observer = self._wrote
        self.starts()
        if resumed is not None:
            self.event(Event.RESUME, self._mark, 0.0)

    @property
    def steps(self) -> int:
        """Steps in it, with one that is under way."""
        return self.file.rows[STEPS]

    # Of a step.

    def starts(self) -> None:
        """The next step begins now: what lies before it is no step's."""
        self._mark, self._before, self._pull = time.perf_counter(), self._times(), 0.0

    def step_begins(self, taken: np.ndarray) -> None:
        """The gradient on the samples ``taken`` is about to be computed; loading them belongs to the step."""
        file, size = self.file, len(taken)
        if self._full or not (file.room(STEPS, 1) and file.room(SAMPLES, size)):
            self._give_up()
            return
        row, first = file.rows[STEPS], file.rows[SAMPLES]
        file.samples[first : first + size] = taken
        self._batch = size, first
        none = math.nan
        start = self._mark + self._shift
        STEP_ROW.pack_into(file.step_bytes, STEP_ROW.size * row, start, none, none, none, none, none, none, size, first)
        file.count(SAMPLES, first + size)
        file.count(STEPS, row + 1)

    def step_ends(self, loss: float) -> None:
        """The step is over."""
        if self._full:
            return
        now, times, before, mark, pull = time.perf_counter(), self._times(), self._before, self._mark, self._pull
        communicate, wait = times[0] - before[0], times[1] - before[1]
        row, shift, file = self.file.rows[STEPS] - 1, self._shift, self.file
        spent = (now - mark - communicate - wait, wait, communicate - pull, pull)
        STEP_ROW.pack_into(file.step_bytes, STEP_ROW.size * row, mark + shift, now + shift, *spent, loss, *self._batch)
        self._mark, self._before, self._pull = now, times, 0.0

    # Of the mode: see ``hpcasync.modes.recorder``.

    def pushing(self, grads: Sequence[np.ndarray | None], hypers: Sequence[np.ndarray], clock: int) -> None:
        only_read = None
        if any([g is None for g in grads]):
            only_read = np.array([all(grads[p] is None for p in params) for params in self._params])
        self._pushed = clock, only_read
        now = [hypers[i].tobytes() for i in self._group_starts]
        if not self._full and now != self._hypers:
            if not self.file.room(HYPERS, 1):
                self._give_up()
                return
            self._hypers = now
            row = self.file.rows[HYPERS]
            self.file.hypers[row] = [hypers[i] for i in self._group_starts]
            self.file.count(HYPERS, row + 1)
        if self._outlived and not self._full:  # should this rank die in the push, the others' replay needs to know of it
            if not self.file.room(EVENTS, 1):
                self._give_up()
                return
            begins = time.perf_counter()
            self._write(self.file.rows[EVENTS], Event.PUSH, 0, begins, begins, 0.0)

    def _wrote(self, shard: int, read: int, version: int) -> None:
        """A shard of the push under way is done, its lock still held."""
        if not self._full:
            self.file.versions[self.file.rows[EVENTS], shard] = version

    def event(self, kind: Event, began: float, waited: float) -> None:
        now = time.perf_counter()
        file, read = self.file, self._read
        if self._full or (kind in _QUIET and not waited and np.array_equal(read, self._last)):
            return
        if not file.room(EVENTS, 1):
            self._give_up()
            return
        if kind in _PULLS:
            self._pull += now - began - waited
        digest = model_digest(self._run.model) if kind is Event.SYNC else 0
        if kind is Event.SYNC and self._meetings is not None:
            self._meetings.over()
        index = file.rows[EVENTS]
        self._write(index, kind, digest, began, now, waited)
        file.count(EVENTS, index + 1)
        self._last[:] = read

    def _write(self, index: int, kind: Event, digest: int, began: float, ended: float, waited: float) -> None:
        """A row of ``events``; it does not count yet."""
        file, read = self.file, self._read
        step = file.rows[STEPS]
        batch = hyper = clock = 0
        only_read = None
        if kind in _GRADIENTS:
            batch = step if self._guided is None else self._guided.replaying or step
        if kind is Event.PUSH:
            clock, only_read = self._pushed
            hyper = file.rows[HYPERS] - 1
        elif kind is Event.SYNC:
            clock = self._run.world.size
        times = began + self._shift, ended + self._shift, waited
        file.versions[index] = read if only_read is None else np.where(only_read, ~read, read)
        EVENT_ROW.pack_into(file.event_bytes, self._event_size * index, kind, hyper, digest, step, batch, clock, *times)

    @contextmanager
    def span(self, kind: Event) -> Iterator[None]:
        """Record what is done meanwhile, between two steps, as one event."""
        began, waited = time.perf_counter(), self._share.wait
        yield
        self.event(kind, began, self._share.wait - waited)
        self.starts()

    # Of checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """How much has been recorded; all of it is on the disk then."""
        self.file.flush()
        return {"counts": list(self.file.rows), "full": self._full}

    def close(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Write the file in its final form. Collective.

        Args:
            model: at the end of the run; None for a run that stopped before.

        Returns:
            Facts for the run's result.
        """
        mode = self._run.mode
        if isinstance(mode, Async):
            mode.recorder = mode._worker.observer = None
        final = None if model is None else model_arrays(model)
        digest = "" if final is None else arrays_digest(final)
        survival = self._run.survival  # who died in earlier starts ended them: the record has been cut to the checkpoint
        first = self._run.world.rank == 0
        if survival is not None and first:  # rank 0 last: it tells who has died before writing a file of its own
            survival.together(survival.star.Barrier)
        facts: dict[str, Any] = {"full": self._full, "deaths": [] if survival is None else survival.deaths}
        arrays: dict[str, np.ndarray] = {}
        if final is not None:
            facts["parameters_sha256"] = digest
            if first:
                arrays |= {f"final/{name}": values for name, values in final.items()}
        if survival is not None and self._meetings is not None:
            arrays |= self._meetings.arrays() | torn_arrays(survival.torn)
        try:
            self.file.close(arrays, facts, ended=final is not None)
        except UsageError as error:
            print(f"hpcasync: warning: {error}. The record stays in its longer form", file=sys.stderr, flush=True)
            self.file.leave()
        if survival is not None and not first:
            survival.together(survival.star.Barrier)
        return {"parameters_sha256": digest}

    def _keep(self, old: Any, counts: Sequence[int]) -> None:
        """Go on after the rows that the checkpoint knows of."""
        for i, name in enumerate(COUNTED):
            rows = getattr(old, name)[: counts[i]]
            if len(rows) < counts[i] or not self.file.room(i, len(rows)):
                raise UsageError(f"{old.path} is shorter than the checkpoint says; leave --record out, or start anew")
            getattr(self.file, name)[: len(rows)] = rows
            self.file.count(i, len(rows))

    def _most(self) -> dict[str, int]:
        """Rows that there can be: an update has three events at most, beside what is done once per epoch or checkpoint.

        Twice as many, since what is not used costs nothing.
        """
        run, config = self._run, self._run.config
        ranks = run.world.size if run.survival is not None else 1  # an epoch of the last one is so many times as long
        steps = 2 * config.epochs * len(run.batches) * ranks
        rho = config.rho
        updates = steps + (steps // rho + 1) * most_replays(rho) if run.guided is not None else steps
        saves = steps // config.checkpoint_every if config.checkpoint_every else 0
        events = 3 * updates + 2 * saves + 16 * config.epochs + 1024
        hypers = updates if run.schedule is not None else 64
        return {"steps": steps + 1, "events": events, "samples": (steps + 1) * run.batches.batch, "hypers": hypers + 64}

    def _facts(self, token: str, epoch: float) -> dict[str, Any]:
        run, mode = self._run, self._run.mode
        world = mode.world
        return {
            "run": token,
            "rank": run.world.rank,
            "ranks": run.world.size,
            "node": run.world.node,
            "nodes": run.world.nodes,
            "device": world.device.type,
            "threads": world.threads,
            "config": run.config.keys(),
            "data": run.dataset.header.checksum,
            "data_path": str(run.dataset.path),
            "code": code_version(run.config.model),
            "machine": {"host": platform.node(), "cpu": torch.backends.cpu.get_cpu_capability(), "mpi": run.world.library},
            "shard_elements": mode.shard_elements if isinstance(mode, Async) else 0,
            "shards": len(self._params),
            "groups": [len(g["params"]) for g in mode.param_groups],
            "start_sha256": arrays_digest(model_arrays(run.model)),
            "outlived": self._outlived,
            "epoch_of_times": epoch,
        }

    def _times(self) -> tuple[float, float]:
        return self._share.communicate + self._share.copy, self._share.wait

    def _give_up(self) -> None:
        if self._full:
            return
        self._full = True
        rank, path = self._run.world.rank, self.file.path
        print(
            f"hpcasync: warning: rank {rank}: no room for more of the record {path}; the run goes on without",
            file=sys.stderr,
            flush=True,
        )


def model_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, as they are now, copied."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().to("cpu", copy=True).contiguous().numpy() for name, t in tensors.items()}


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and bytes."""
    total = hashlib.sha256()
    for name, values in arrays.items():
        total.update(json.dumps([name, values.dtype.str, values.shape]).encode())
        total.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def model_digest(model: nn.Module) -> int:
    """CRC-32 over parameters and buffers: fast, to find where two runs part."""
    crc = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        values = tensor.detach().to("cpu").contiguous().numpy()
        crc = zlib.crc32(values.reshape(-1).view(np.uint8).data, crc)
    return crc
