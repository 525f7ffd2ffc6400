"""Saves a run as it goes and on a signal, and brings it back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcasync.errors import UsageError
from hpcasync.modes import Async, Hierarchical, Mode
from hpcasync.modes.recorder import Event
from hpcasync.modes.state import idle
from hpcasync.modes.wrapper import Wrapper
from hpcasync.train.agreement import Agreement, Decision, Free, Outliving
from hpcasync.train.checkpoint import Stateful, restore, save_alone, save_checkpoint
from hpcasync.train.checkpoint_folder import next_checkpoint, prune, sweep
from hpcasync.train.checkpoint_ranks import Reading
from hpcasync.train.in_step import InStep, Overlapped
from hpcasync.train.records import RunFolder, environment, read_rows
from hpcasync.train.survive import Survival

if TYPE_CHECKING:
    from hpcasync.train.run import Run


class Keeper:
    """Decides with the other ranks when to save and when to stop, and saves.

    Args:
        run: the run; its ``batches``, ``schedule`` and ``guided`` are saved with it.
        folder: of the run, on rank 0.

    Attributes:
        resumed_from: the checkpoint that the run goes on from, empty if it is a fresh one.
        restarts: how often the run has been resumed.
        reset: what was reset then.
        newest: the last checkpoint written.
        folder: where they lie.
    """

    def __init__(self, run: Run, folder: RunFolder | None) -> None:
        self._run, self._folder = run, folder
        self._every, self._keep = run.config.checkpoint_every, run.config.keep
        self._agreement = make_agreement(run.mode, run.survival)
        self._warned = False
        self.folder = Path(run.world.gather(str(folder.path) if folder is not None else "")[0])
        self.resumed_from, self.restarts, self.newest = "", 0, ""
        self.reset: tuple[str, ...] = ()
        if folder is not None:
            sweep(folder.path)

    def after_step(self) -> bool:
        """Save if it is time or if a signal came; whether to stop. Collective in the modes whose steps are."""
        run = self._run
        due = self._every is not None and self._every > 0 and run.steps % self._every == 0
        if not self._agreement.wanted(due):
            return False
        return self._meet(due).stop

    def end_of_epoch(self) -> bool:
        """Whether to stop. Mode async: waits for those that still work on their epoch, saving with them. Collective."""
        while goes_free(self._run.mode):
            decision = self._meet(False, end=True)
            if decision.stop or decision.end:
                return decision.stop
        if not self._agreement.asked_to_stop():
            return False
        self._save(must=True)
        return True

    def after_epoch(self) -> None:
        """Save if epochs are what is saved after, or if the run is over. Collective."""
        over = self._run.epoch > self._run.config.epochs
        if self._every is None or (over and self._every > 0):
            self._run.together(lambda: self._save(must=False))

    def close(self) -> None:
        """Leave the other ranks. Collective."""
        self._agreement.close()

    def restore(self, source: Reading) -> None:
        """Bring the run to where the checkpoint was made. Collective."""
        run = self._run
        found = restore(source, run.mode, self._parts())
        self.resumed_from, self.reset = str(source.path), found.reset
        self.restarts = int(source.facts["restarts"]) + 1
        run.earlier_deaths = source.facts.get("deaths", [])
        if not source.same(run.world.size):
            self.reset = (*run.on_other_ranks(), *self.reset)
        if run.world.rank == 0:
            text = f"resumed from {source.path}: epoch {run.epoch}, step {run.step}"
            if source.alone is not None:
                text += f"; saved by rank {source.alone} of {source.ranks}, when another one hung"
            if source.ranks != run.world.size:
                text += f"; made by {source.ranks} ranks, now {run.world.size}"
            if self.reset:
                text += f". Reset: {'; '.join(self.reset)}"
            print(f"hpcasync: {text}", file=sys.stderr, flush=True)

    def save_alone(self) -> Path:
        """Write a checkpoint of this rank's state, while its thread is held in an operation that has stalled. Not collective.

        The step under way is made again. Older checkpoints stay. Modes sync and kstep.
        """
        run = self._run
        assert isinstance(run.mode, Wrapper)
        states = {name: part.state_dict() for name, part in self._parts().items() if part is not run}
        whole = run.step == len(run.batches)
        states["loader"] |= {"epoch": run.epoch - 1 + whole, "batch": 0 if whole else run.step}
        path = next_checkpoint(self.folder)
        save_alone(path, run.mode, states | {"run": run.state_dict(alone=True)}, self._facts())
        return path

    def _meet(self, due: bool, end: bool = False) -> Decision:
        return self._run.together(lambda: self._meet_once(due, end))

    def _meet_once(self, due: bool, end: bool) -> Decision:
        run = self._run
        with idle(run.mode), run.world.phase("the meeting at the end of an epoch" if end else "a checkpoint"):
            with run.span(Event.MEET):
                decision = self._agreement.decide(due, end)
            if decision.save:
                self._save(must=decision.stop)
        return decision

    def _save(self, must: bool) -> None:
        """Write a checkpoint; a run that goes on survives a failure, with one warning: the checkpoint before stays."""
        run = self._run
        share = run.mode.share
        running = share.running
        share.stop()
        path = Path(run.world.gather(str(next_checkpoint(self._folder.path)) if self._folder is not None else "")[0])
        try:
            self._check_lock()
            with run.span(Event.CHECKPOINT):
                save_checkpoint(path, run.mode, facts=self._facts(), **self._parts())
        except UsageError as error:
            if must:
                raise UsageError(f"stopped without a new checkpoint: {error}") from error
            if not self._warned and run.world.rank == 0:
                print(f"hpcasync: warning: {error}. The run goes on; the checkpoint before stays", file=sys.stderr, flush=True)
            self._warned = True
        else:
            self.newest, self._warned = str(path), False
            if self._folder is not None:
                prune(self._folder.path, self._keep)
                sweep(self._folder.path)  # a folder that was away when a write failed may have kept its beginning
        if running:
            share.start()

    def _check_lock(self) -> None:
        problem = None
        try:
            if self._folder is not None:
                self._folder.lock.check()
        except UsageError as error:
            problem = str(error)
        problem = self._run.world.gather(problem)[0]
        if problem is not None:
            raise UsageError(problem)

    def _parts(self) -> dict[str, Stateful]:
        run = self._run
        parts: dict[str, Any] = {"loader": run.batches, "run": run, "schedule": run.schedule, "guided": run.guided}
        return {name: part for name, part in parts.items() if part is not None}

    def _facts(self) -> dict[str, Any]:
        run = self._run
        return {
            "config": run.config.keys(),
            "data": run.dataset.header.checksum,
            "position": {"epoch": run.epoch, "step": run.step, "steps": run.steps},
            "rows": self._folder.rows if self._folder is not None else read_rows(self.folder),
            "restarts": self.restarts,
            "deaths": run.deaths,
            "dead": len(run.deaths) - len(run.earlier_deaths),
            "environment": environment(run.world),
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }


def make_agreement(mode: Mode, survival: Survival | None = None) -> Agreement:
    """The one that fits the mode. Collective."""
    if survival is not None:
        return Outliving(mode, survival)
    if mode.everyone.size == 1:
        return Agreement(mode)
    if goes_free(mode):
        return Free(mode)
    return Overlapped(mode) if isinstance(mode, Hierarchical) and mode.delay else InStep(mode)


def goes_free(mode: Mode) -> bool:
    """Whether each rank makes its steps at its own pace, and need not make as many as the others."""
    return isinstance(mode, Async) and not isinstance(mode, Hierarchical)
