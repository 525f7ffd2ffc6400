"""What a stalled job does: it names the ranks that hang, saves what it has, and ends; or goes on without them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch.utils.hooks import RemovableHandle

from hpcasync.comm import World
from hpcasync.comm.signs import BOUND, GRADIENTS, LOCK, MODELS, TURN
from hpcasync.comm.stall import Watch
from hpcasync.comm.watched import WatchedCollectives
from hpcasync.errors import UsageError
from hpcasync.launched import note_hung
from hpcasync.modes import Async, KStep, Mode, Sync
from hpcasync.proc import started
from hpcasync.store import IDLE
from hpcasync.train.checkpoint import Stateful, save_alone
from hpcasync.train.config import TrainConfig
from hpcasync.train.keeper import Keeper
from hpcasync.train.survive import Survival


class StallWatch:
    """Ends a job in which a rank hangs, in place of waiting for it for ever. Constructor and ``close`` are collective.

    When a rank waits in an operation of ``mode`` and no rank has moved for ``seconds``, the ranks that have not come are named
    on standard error, with the operation, the step, and where they are instead. One of those that wait saves what it has, and
    all end with exit code 76. Until every rank has made a step the limit is ten times as long, at most half an hour.

        with ha.Sync(optimizer, model=model) as opt, ha.StallWatch(opt, 300, "run/stalled.h5", loader=batches):
            ...

    ``load_checkpoint("run/stalled.h5", opt, loader=batches)`` goes on from there. In mode sync the model is that before the step
    that hung; in mode kstep it is that of the rank that saved, within its block of local steps (or the last average, when the
    sum itself hung). The batch that was under way is left out; random numbers begin anew.

    Args:
        mode: a `Sync` or a `KStep`.
        seconds: for so long nothing may stand still, > 0. Longer than the longest pause between two steps in which some ranks
            wait, such as an evaluation by rank 0 alone.
        path: of the checkpoint; None saves nothing.
        parts: by name what else has a state, as for ``save_checkpoint``.

    Raises:
        UsageError: another mode, or seconds out of range.
    """

    def __init__(
        self, mode: Mode, seconds: float = 600.0, path: str | os.PathLike[str] | None = None, **parts: Stateful
    ) -> None:
        if not isinstance(mode, (Sync, KStep)):
            raise UsageError(f"StallWatch is for modes sync and kstep; found {type(mode).__name__}")
        if not seconds > 0:
            raise UsageError(f"seconds={seconds!r}: expected a positive number")

        def save() -> str:
            if path is None:
                return "No checkpoint: none was asked for."
            save_alone(path, mode, {name: part.state_dict() for name, part in parts.items()})
            return _saved(mode, Path(path))

        self._watch: Watch | None = None
        if mode.everyone.size > 1:
            self._mode, self._before = mode, (mode.world, mode.collectives)
            self._watch = Watch(mode.everyone, seconds)
            mode.everyone = mode.world = self._watch.world
            self._hook = _begin(self._watch, mode, save)

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        if self._watch is not None:
            self._watch.close()
            self._hook.remove()
            mode, (world, collectives) = self._mode, self._before
            mode.everyone = mode.world = world
            closed = getattr(mode.collectives, "inner", None) is not collectives
            mode.collectives = world.collectives if closed else collectives
            self._watch = None

    def __enter__(self) -> StallWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def watched(config: TrainConfig, world: World) -> Iterator[World]:
    """The same ranks, watched inside as ``config`` says. Collective."""
    if world.size == 1 or not config.stall_seconds or config.mode == "hierarchical":
        yield world
        return
    watch = Watch(world, config.stall_seconds)
    try:
        yield watch.world
    finally:
        watch.close()


def watch_run(mode: Mode, keeper: Keeper, survival: Survival | None = None) -> None:
    """Where the world of ``mode`` is watched: from here on there is a run to be saved. Collective."""
    watch = mode.everyone.watch
    if watch is None:
        return
    if isinstance(mode, Async):
        _begin_free(watch, mode, keeper, survival)
        return
    assert isinstance(mode, (Sync, KStep))

    def save() -> str:
        path = keeper.save_alone()
        return f"{_saved(mode, path)} Go on with --resume auto --output {path.parent}."

    _begin(watch, mode, save)


def _begin(watch: Watch, mode: Sync | KStep, save: Callable[[], str]) -> RemovableHandle:
    """Count the steps of ``mode`` until the handle is removed, and tell what its operations are."""
    kind = GRADIENTS if isinstance(mode, Sync) else MODELS
    mode.collectives = WatchedCollectives(mode.collectives, watch.signs, kind)
    watch.begin(mode.steps, save, note_hung)
    return mode.register_step_post_hook(lambda *_: watch.signs.stepped())


def _begin_free(watch: Watch, mode: Async, keeper: Keeper, survival: Survival | None) -> None:
    """The same for mode async: ranks wait for a holder of a lock, for a turn, for the bound on staleness, or in a meeting."""
    store, signs = mode.store, watch.signs
    processes = mode.everyone.gather((os.getpid(), started(os.getpid())))

    def guilty(kind: int, missing: list[int]) -> list[int]:
        if kind == LOCK:
            return [rank for rank in store.holders() if rank in missing]
        if kind in (TURN, BOUND):
            slow = [r for r in missing if store.clocks[r] != IDLE and not (kind == TURN and store.excused[r])]
            return [r for r in slow if store.clocks[r] == store.clocks[slow].min()]
        return missing

    def save() -> str:
        newest = keeper.newest or keeper.resumed_from
        which = f"The newest checkpoint is {newest}, go on with --resume auto" if newest else "No checkpoint has been made yet"
        return f"{which} --output {keeper.folder}." if newest else f"{which}."

    fence = None if survival is None else lambda ranks: survival.fence({rank: processes[rank] for rank in ranks})
    watch.begin(mode.steps, save, note_hung, guilty, fence)
    mode._worker.signs = signs
    mode.register_step_post_hook(lambda *_: signs.stepped())


def _saved(mode: Sync | KStep, path: Path) -> str:
    rank = mode.everyone.rank
    if isinstance(mode, Sync):
        what = "the model and optimizer that all ranks share"
    elif mode.averaging:
        what = f"the model after the last average, rank {rank}'s optimizer"
    else:
        what = f"rank {rank}'s own model and optimizer, inside its block of local steps, and the last average"
    return f"Checkpoint {path} (on {socket.gethostname()}, by rank {rank}): {what}."
