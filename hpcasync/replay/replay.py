"""Re-executes a recorded asynchronous run in one process, in its order of reads and writes per shard.

A rank's gradient depends on its copy of the model, and that on the versions of the shards that it read last. Updates of a
shard are made in the order of their versions, and none before all recorded reads of the version it replaces. So every rank
finds the bits that it found live, and so does the shared state, whatever order the replay takes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcasync.modes.recorder import Event
from hpcasync.replay.check import build_model, check_replayable, config_of, open_data
from hpcasync.replay.deaths import Left, deaths_of, with_last_pushes
from hpcasync.replay.order import order_of
from hpcasync.replay.rank import Computed, Gradients, Rank, average_buffers, start_randoms
from hpcasync.replay.tables import check_tables
from hpcasync.store import LocalStore, aligned_zeros, make_layout
from hpcasync.train.record import arrays_digest, model_arrays, model_digest
from hpcasync.train.record_file import RankRecord, read_record

GRADIENTS = (Event.PUSH, Event.SKIP, Event.DISCARD)
"""Events that a gradient is computed for."""

Watch = Callable[[Rank, Computed], None]
"""Told of every gradient, before it is applied."""


@dataclass
class Outcome:
    """What a replay found.

    Attributes:
        events: replayed, of those recorded.
        recorded: events recorded.
        updates: pushes replayed.
        complete: all of a run that came to its end.
        difference: the first one between the run and its replay.
        parameters_sha256: of the model after the last event of rank 0.
    """

    events: int = 0
    recorded: int = 0
    updates: int = 0
    complete: bool = False
    difference: dict[str, Any] | None = None
    parameters_sha256: str = ""
    stopped_at: list[dict[str, int]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether all that was replayed is as recorded."""
        return self.difference is None


class Replay:
    """A recorded run, about to be replayed.

    Args:
        run: its folder.
        data: see ``open_data``.
        any_code: replay although the code is not that of the run.
        watch: told of every gradient.

    Raises:
        UsageError: no record, an incomplete one, or one that can't be replayed here.
    """

    def __init__(self, run: Path, *, data: str | None = None, any_code: bool = False, watch: Watch | None = None) -> None:
        self.records: list[RankRecord] = with_last_pushes(read_record(run))
        self._dead = {death["rank"] for death in deaths_of(self.records)}
        facts = self.records[0].facts
        config = config_of(self.records)
        rule = check_replayable(run, self.records, config)
        dataset = open_data(run, self.records[0], config, data)
        model = build_model(run, self.records[0], config, dataset, any_code=any_code)
        check_tables(self.records, model, len(dataset.as_torch("train")))
        self._threads = int(facts["threads"])
        sizes = [p.numel() for p in model.parameters()]
        self._layout = make_layout(sizes, facts["shard_elements"])
        self._owners = np.repeat(np.arange(len(facts["groups"])), facts["groups"])
        self.store = LocalStore(self._layout, rule, workers=len(self.records), threads=self._threads)
        start = aligned_zeros(1, self._layout.total)[0]
        for p, first, size in zip(model.parameters(), self._layout.starts, self._layout.sizes, strict=True):
            start[first : first + size] = p.detach().reshape(-1).numpy()
        self.store.publish(start)
        self.ranks = [
            Rank(
                record,
                self.store.worker(i),
                self.store.state[0] if len(self.records) == 1 and not rule.own_copy else _copy(start),
                [b.detach().clone() for b in model.buffers()],
                start_randoms(record, config.seed + 1 + i),
            )
            for i, record in enumerate(self.records)
        ]
        self.order = order_of(self.records, own_copy=rule.own_copy)
        self._left = Left(self.records, self.order, self.store, list(model.buffers()))
        self._met = len(self.records)
        self._meetings = [int((r.events["kind"] == Event.SYNC).sum()) for r in self.records]
        self._gradients = Gradients(model, self._layout, dataset.as_torch("train"))
        self._watch, self.model = watch, model
        self.longest = max(len(record.steps) for record in self.records)
        self.outcome = Outcome(recorded=sum(len(r.events) for r in self.records))

    def run(self, until: int | None = None, rank: int | None = None) -> Outcome:
        """Replay, as far as the record goes.

        Args:
            until: every rank makes its steps up to this one, and more only where another needs their updates.
            rank: only of this rank's steps, with ``until``.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            self._run(until, rank)
        finally:
            torch.set_num_threads(before)
        outcome = self.outcome
        outcome.events = sum(r.at for r in self.ranks)
        closed = [r.record.closed or i in self._dead for i, r in enumerate(self.ranks)]
        outcome.complete = all(closed) and all(r.done for r in self.ranks)
        if until is None and not outcome.complete:
            outcome.stopped_at = [{"rank": i, "step": int(r.event["step"])} for i, r in enumerate(self.ranks) if not r.done]
            if all(closed):
                self._differs("order", self.ranks[outcome.stopped_at[0]["rank"]], "an update", "none that can follow")
        self._compare_end()
        return outcome

    def _run(self, until: int | None, only: int | None) -> None:
        def wanted(i: int, rank: Rank) -> bool:
            return not rank.done and (until is None or (only in (None, i) and int(rank.event["step"]) <= until))

        while True:
            called = [r for i, r in enumerate(self.ranks) if wanted(i, r)]
            if not called:
                return
            if any([self._advance(rank) for rank in called]):
                continue
            others = [r for r in self.ranks if r not in called and not r.done]
            if not any([self._advance(rank) for rank in sorted(others, key=lambda r: int(r.event["step"]))]):
                return

    def _advance(self, rank: Rank) -> bool:
        """Do what can be done of the rank's next event; whether that was anything."""
        moved = rank.todo is None
        if rank.todo is None:
            rank.todo = self._begin(rank)
        left = [k for k in rank.todo if not self._do(rank, k)]
        moved = moved or len(left) < len(rank.todo)
        rank.todo = left
        if left:
            return moved
        if rank.event["kind"] == Event.SYNC and not self._meet(rank):
            return moved
        self._end(rank)
        return True

    def _begin(self, rank: Rank) -> list[int]:
        """Compute the event's gradient, if it has one; returns the shards that it touches."""
        event, i = rank.event, rank.worker.index
        if event["kind"] in GRADIENTS:
            batch = int(event["batch"])
            found = self._gradients(rank, rank.record.indices(batch))
            rank.grads = found.grads
            if self._watch is not None:
                self._watch(rank, found)
            live = float(rank.record.steps[batch - 1]["loss"])
            ended = not np.isnan(rank.record.steps[batch - 1]["end"])
            if batch == event["step"] and ended and not _same(live, found.loss):
                self._differs("loss", rank, live, found.loss)
            if found.finite == (event["kind"] == Event.SKIP):
                words = ("NaN or infinity in the gradient", "a finite gradient")
                self._differs("gradient", rank, *(words if found.finite else words[::-1]))
        touched = self.order.writes[i][rank.at] | self.order.reads[i][rank.at]
        if event["kind"] == Event.PUSH and not touched.any():  # of a copy that is the rank's own
            self.store._step_alone(rank.worker, rank.grads, rank.copy, self._hypers(rank))
        return [int(k) for k in np.flatnonzero(touched)]

    def _do(self, rank: Rank, k: int) -> bool:
        """Do the event's part in shard ``k`` if its turn has come."""
        self._left.tear(k)
        store, worker, shard = self.store, rank.worker, self._layout.shards[k]
        version, there = int(rank.record.versions[rank.at, k]), int(store.versions[k])
        if self.order.writes[worker.index][rank.at, k]:
            if there != version - 1 or self.order.readers[k, there]:
                return False
            clock = int(rank.event["clock"])
            store._push_shard(worker, k, shard, rank.grads, rank.copy, self._hypers(rank), clock)
            if int(store.versions[k]) != version:
                self._differs("gradient", rank, f"a gradient for shard {k}", "none")
                store.versions[k] = version
            return True
        if there != version:
            return False
        self.order.readers[k, version] -= 1
        np.copyto(rank.copy[shard.start : shard.stop], store.state[0, shard.start : shard.stop])
        worker.read[k] = version
        return True

    def _meet(self, rank: Rank) -> bool:
        """Whether all that took part in this ``synchronize()`` have come; the last one averages the buffers."""
        number = rank.syncs
        party = [r for r, count in zip(self.ranks, self._meetings, strict=True) if count > number]
        if any(r.syncs == number and not _waits(r) for r in party):
            return False
        if all(r.syncs == number for r in party):  # the first to leave
            average_buffers(party, self._left.meetings.get(number))
            met = int(rank.event["clock"])
            if 0 < met < self._met:  # ranks had died since the meeting before; 0 in records of an earlier version
                for i, r in enumerate(party):
                    self.store.forget_the_dead(r.worker, shared=i == 0)
            self._met = met or self._met
        rank.syncs += 1
        return True

    def _end(self, rank: Rank) -> None:
        event = rank.event
        if event["kind"] == Event.PUSH:
            rank.worker.steps += 1
            self.outcome.updates += 1
        elif event["kind"] == Event.SYNC:
            found = model_digest(self._gradients.load(rank))
            if found != event["digest"]:
                self._differs("parameters", rank, int(event["digest"]), found)
        rank.at += 1
        rank.todo, rank.grads = None, []

    def _hypers(self, rank: Rank) -> list[np.ndarray]:
        table = rank.record.hypers[int(rank.event["hyper"])]
        return [table[group] for group in self._owners]

    def _compare_end(self) -> None:
        first = self.ranks[0]
        found = model_arrays(self._gradients.load(first))
        self.outcome.parameters_sha256 = arrays_digest(found)
        if not self.outcome.complete:
            return
        for name, values in first.record.final.items():
            live, mine = values.reshape(-1), found[name].reshape(-1)
            place = np.flatnonzero(live.view(np.uint8) != mine.view(np.uint8))[:1] // live.itemsize  # NaN is equal to itself
            if len(place):
                self._differs(f"{name}, element {place[0]}", first, live[place[0]].item(), mine[place[0]].item())
        if self.outcome.parameters_sha256 != first.record.end["parameters_sha256"]:
            self._differs("final parameters", first, first.record.end["parameters_sha256"], self.outcome.parameters_sha256)

    def _differs(self, what: str, rank: Rank, recorded: Any, replayed: Any) -> None:
        """Keep the first difference."""
        if self.outcome.difference is None:
            step = len(rank.record.steps) if rank.done else int(rank.event["step"])
            self.outcome.difference = {
                "what": what, "rank": rank.worker.index, "step": step, "recorded": recorded, "replayed": replayed
            }  # fmt: skip


def _waits(rank: Rank) -> bool:
    """Whether a rank has done all of its ``synchronize()`` but to leave it."""
    return not rank.done and rank.todo == [] and bool(rank.event["kind"] == Event.SYNC)


def _copy(values: np.ndarray) -> np.ndarray:
    made = aligned_zeros(1, values.size)[0]
    made[:] = values
    return made


def _same(a: float, b: float) -> bool:
    return a == b or (np.isnan(a) and np.isnan(b))
