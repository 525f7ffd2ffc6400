"""One pass through the epochs: steps, meetings, evaluations, and where it is for a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from hpcasync import launched
from hpcasync.comm import World, together
from hpcasync.data import Dataset, Loader
from hpcasync.errors import UsageError
from hpcasync.modes import Async, Guided, Mode, Sync
from hpcasync.modes.recorder import Event
from hpcasync.stats import Staleness
from hpcasync.train import signals
from hpcasync.train.config import TrainConfig
from hpcasync.train.evaluate import evaluate
from hpcasync.train.inside import Inside
from hpcasync.train.keeper import Keeper
from hpcasync.train.progress import Progress
from hpcasync.train.record import Record
from hpcasync.train.records import RunFolder
from hpcasync.train.step_log import StepLog
from hpcasync.train.survive import Survival

T = TypeVar("T")

_PLACE = ("epoch", "step", "steps", "loss", "seen", "row")


class Run:
    """One pass through the epochs.

    Attributes:
        epoch: the present one, from 1.
        step: steps of this rank in it.
        steps: steps of this rank in all.
        samples: samples of this rank in all.
        row: the last evaluation.
        record: with ``--record``.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        dataset: Dataset,
        batches: Loader,
        model: nn.Module,
        mode: Mode,
        progress: Progress,
        folder: RunFolder | None,
        verification: tuple[torch.Tensor, torch.Tensor] | None,
        survival: Survival | None = None,
    ) -> None:
        self.config, self.dataset, self.batches, self.survival = config, dataset, batches, survival
        self.model, self.mode, self.progress, self.folder = model, mode, progress, folder
        self._first_batches = batches
        steps = config.epochs * len(batches)
        self.schedule = CosineAnnealingLR(mode, steps) if config.schedule == "cosine" else None
        self.guided = None
        if verification is not None:
            assert isinstance(mode, (Async, Sync))
            self.guided = Guided(mode, self._loss, verification, rho=config.rho)
        self.epoch, self.step, self.steps, self.samples = 1, 0, 0, 0
        self.loss, self.seen = 0.0, 0  # of the present epoch: sum of the losses of its samples, and their number
        self.row: dict[str, Any] = {}
        self.earlier_deaths: list[launched.Death] = []  # before this start of the run
        self.log = StepLog(mode.share)
        self.inside = Inside(mode, self.guided, world)
        self.record: Record | None = None
        self._recorded: dict[str, Any] | None = None  # of the checkpoint that the run goes on from

    @property
    def world(self) -> World:
        """The ranks; with `Survival` the living ones."""
        return self.mode.everyone

    @property
    def deaths(self) -> list[dict[str, Any]]:
        """Of the ranks that have died, also in earlier starts."""
        return self.earlier_deaths + ([] if self.survival is None else self.survival.deaths)

    def together(self, meeting: Callable[[], T]) -> T:
        """Hold a meeting, with `Survival` again from its start when a rank dies in it. Collective."""
        return meeting() if self.survival is None else self.survival.together(meeting)

    def begin_record(self, folder: Path, keeper: Keeper) -> None:
        """Record from here on, after what was recorded before the checkpoint. Collective.

        Raises:
            UsageError: the same on every rank: see `Record`; or the checkpoint can't be gone on from with a record.
        """
        mode, resumed = self.mode, bool(keeper.resumed_from)
        across = isinstance(mode, Async) and mode.world.nodes > 1 and mode.rule.in_turn  # the rounds begin anew
        broken = self._recorded is None or self._recorded["full"] or bool(keeper.reset) or across
        if resumed and any(self.world.gather(broken)):
            if launched.restarted():
                if self.world.rank == 0:
                    print(
                        f"hpcasync: warning: {keeper.resumed_from} can't be gone on from with a record: the run goes on without",
                        file=sys.stderr,
                        flush=True,
                    )
                return
            raise UsageError(
                f"--record: {keeper.resumed_from} can't be gone on from with a record, which has to be whole from the first step "
                "on, with the same ranks; leave --record out, or start anew"
            )
        self.record = Record(self, folder, self._recorded)

    def span(self, kind: Event) -> AbstractContextManager[None]:
        """What is done inside is recorded as one event."""
        return nullcontext() if self.record is None else self.record.span(kind)

    def epochs(self, keeper: Keeper) -> str:
        """Train what is left of the epochs, evaluate after every ``eval_every``-th and after the last.

        Returns:
            The signal that stopped it after a checkpoint, empty at the end.
        """
        last = self.config.epochs
        while self.epoch <= last:
            stop = self._epoch(keeper)
            self.progress.meets()
            if stop or keeper.end_of_epoch():
                return next(filter(None, self.together(lambda: self.world.gather(signals.received()))), "SIGTERM")
            with self.world.phase("the meeting at the end of an epoch"):
                self.together(self.mode.synchronize)
            self.log.meeting()
            if self._evaluates():
                with self.world.phase("evaluation"), self.span(Event.EVALUATE):
                    self.together(lambda: self._evaluate(self.epoch, np.array([self.loss, self.seen])))
            self.samples += self.seen  # last: a state that is saved before has not counted them
            self.epoch, self.step, self.loss, self.seen = self.epoch + 1, 0, 0.0, 0
            keeper.after_epoch()
        return ""

    def _evaluates(self) -> bool:
        """Whether this epoch ends with an evaluation."""
        return self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs

    def _epoch(self, keeper: Keeper) -> bool:
        """What is left of an epoch; whether to stop."""
        device, record = self.world.device, self.record
        if self.step == len(self.batches):  # resumed at its end
            return False
        if self.survival is not None and self.step == 0:
            self._take_over(self.survival)
        self.batches.set_epoch(self.epoch - 1)
        self.mode.share.start()
        self.log.begin()
        if record is not None:
            record.starts()
        for x, y in self.batches:
            if record is not None:
                record.step_begins(self.batches.taken)
            if self.step + 1 == len(self.batches) and self._evaluates():
                self.inside.last_step()
            batch = x.to(device), y.to(device)
            if self.guided is not None:
                loss = self.guided.step(batch)
            else:
                self.mode.zero_grad()
                loss = self._loss(batch)
                loss.backward()
                self.mode.step()
            if self.schedule is not None:
                self.schedule.step()
            value = loss.item()
            self.loss += value * len(y)
            self.seen += len(y)
            self.step += 1
            self.steps += 1
            self.progress.step(self.epoch, self.step, value, len(y))
            self.log.step()
            if self.survival is not None:
                recorded = 0 if record is None else record.steps
                self.survival.note(self.epoch, self.step, self.samples + self.seen, self.mode.updates, recorded)
            if record is not None:
                record.step_ends(value)
            if keeper.after_step():
                return True
        return False

    def _loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def _evaluate(self, epoch: int, loss: np.ndarray) -> None:
        world = self.world
        test_loss, accuracy = evaluate(self.model, self.dataset, world)
        world.collectives.allreduce(loss)
        totals = np.array([self.samples + self.seen, self.mode.updates], np.float64)
        world.collectives.allreduce(totals)
        totals += [sum(dead[name] for dead in self.deaths) for name in ("samples", "updates")]
        seconds = max(world.gather(self.mode.share.seconds))
        updates = float(self.mode.updates) if self.mode.mode == "sync" else totals[1]
        self.row = {
            "epoch": epoch,
            "updates": updates,
            "seconds": seconds,
            "samples": totals[0],
            "train_loss": loss[0] / loss[1],
            "test_loss": test_loss,
            "test_accuracy": accuracy,
        }
        inside = self.inside.row()
        if inside:
            self.row["inside"] = inside
        together(world, lambda: self.folder.add(self.row) if self.folder is not None else None)
        self.progress.evaluated(self.row, totals[0] / seconds)

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Where the run is, on this rank; in mode async ranks are in different places. Collective.

        Args:
            alone: not collective, the others are taken to be where this rank is; without the record.
        """
        share, mode = self.mode.share, self.mode
        own = {"samples": self.samples, "updates": mode.updates, "skipped": mode.skipped, "counts": mode.staleness.counts}
        return {
            "place": {name: getattr(self, name) for name in _PLACE},
            "share": (share.seconds, share.communicate, share.wait, share.copy),
            "own": own,
            "everyone": [own] * self.world.size if alone else self.world.gather(own),
            "inside": self.inside.state_dict(),
            "record": None if self.record is None or alone else self.record.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        for name in _PLACE:
            setattr(self, name, state["place"][name])
        self.mode.share.load(*state["share"])
        self.mode.staleness.counts = state["own"]["counts"].copy()
        self.samples = state["own"]["samples"]
        if "inside" in state:  # a checkpoint of an earlier version has none
            self.inside.load_state_dict(state["inside"])
        self._everyone = state["everyone"]
        self._recorded = state.get("record")

    def on_other_ranks(self) -> tuple[str, ...]:
        """After loading the state of a run on another number of ranks: begin the epoch again, keep the totals.

        Returns:
            What was reset.
        """
        reset = [f"epoch {self.epoch} begins again"] if self.step else []
        # In mode async the ranks may have been in different places: all begin the epoch that rank 0 was in.
        self.epoch = self.world.gather(self.epoch)[0]
        self.step, self.loss, self.seen = 0, 0.0, 0
        self.inside = Inside(self.mode, self.guided, self.world)
        self.steps = (self.epoch - 1) * len(self.batches)
        first, everyone = self.world.rank == 0, self._everyone
        self.samples = sum(own["samples"] for own in everyone) if first else 0
        self.mode.skipped = sum(own["skipped"] for own in everyone) if first else 0
        if self.mode.mode != "sync":
            self.mode.updates = sum(own["updates"] for own in everyone) if first else 0
        total = Staleness()
        for own in everyone if first else ():
            total = total.merge(Staleness(own["counts"]))
        self.mode.staleness.counts = total.counts
        self._place_schedule()
        return tuple(reset)

    def _take_over(self, survival: Survival) -> None:
        """At the begin of an epoch: deal the data anew if ranks have died since it was dealt."""
        if self.batches.size == self.world.size:
            return
        self.batches = self._first_batches.among(survival.star.members)
        self.steps = (self.epoch - 1) * len(self.batches)
        self.progress.dealt(len(self.batches), self.steps)
        self._place_schedule()

    def _place_schedule(self) -> None:
        """Put the schedule to the same part of the run, when the number of steps is another."""
        if self.schedule is None:
            return
        self.schedule.T_max, self.schedule.last_epoch = self.config.epochs * len(self.batches), self.steps
        for group, lr in zip(self.mode.param_groups, self.schedule._get_closed_form_lr(), strict=True):
            group["lr"] = lr
