"""Mode async outlives its ranks: what a dead one held is given free, and the others go on without it.

Between two meetings nobody needs another rank, so only meetings have to be begun again: the end of an epoch, a checkpoint,
the end of the run. They go over a `Star`, not over MPI, whose collectives never end when a member has died.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hpcasync import launched
from hpcasync.comm import World, failure
from hpcasync.comm.collectives import Collectives
from hpcasync.comm.collectives.over_star import OverStar
from hpcasync.comm.fence import fence
from hpcasync.comm.shared_memory import shared_rows
from hpcasync.comm.star import RankDied, Star
from hpcasync.comm.watched import WatchedCollectives
from hpcasync.errors import UsageError
from hpcasync.modes import Async, Mode
from hpcasync.modes.state import idle
from hpcasync.store import Torn, WindowStore
from hpcasync.train import signals

T = TypeVar("T")

EPOCH, STEP, SAMPLES, UPDATES, RECORDED, CALL, FENCED, GONE, LEAVING = range(9)
"""Words of a rank's row of the board; ``CALL``, in the first row, is of all: the meeting that they are called to. ``FENCED``: the
others have killed it, since it hung; ``GONE``: it is dead; ``LEAVING``: it ends with an error that all have found."""
WORDS = 9
MEET_SECONDS = 10.0
"""How long a rank that leaves with an error waits for the others to do the same."""


class Survival:
    """The ranks of a run in mode async on one node, of which all but rank 0 may die. Constructor collective.

    Args:
        mode: that trains; its world and its store are this one's from here on.
        world: its ranks.

    Attributes:
        world: the living, numbered anew after each death.
        deaths: of those that died, in their order: ``rank`` (its first number), ``time`` (seconds since 1970), ``epoch``,
            ``step``, ``samples`` and ``updates`` (what it had done), ``recorded`` (the step in its record, 0 without one), and
            ``shards`` whose lock it held: a last update of theirs may have been applied in part. On every rank, as of the last
            meeting.
        torn: on rank 0, these shards as they were then.
        told: called on rank 0 with each dead rank's first number and its updates, at once, perhaps in a thread; None for nobody.

    Raises:
        UsageError: another mode, several nodes.
    """

    def __init__(self, mode: Mode, world: World) -> None:
        if not isinstance(mode, Async) or mode.mode != "async" or world.nodes > 1:
            raise UsageError(
                f"launch --survive: mode {mode.mode} on {world.nodes} node(s); only mode async on one node outlives its ranks. "
                "Instead: launch --max-restarts N --min-ranks M, which starts the run again from its last checkpoint without the "
                "lost rank; on several nodes train --resume auto on those that are left"
            )
        if not hasattr(os, "pidfd_open"):
            raise UsageError(
                "launch --survive: needs Linux 5.3 and its pidfd_open, to hear of deaths; instead: launch "
                "--max-restarts N --min-ranks M"
            )
        assert isinstance(mode.store, WindowStore)
        self._mode, self._store, self._first = mode, mode.store, world
        self._board = shared_rows(world, 8 * WORDS)[:, : 8 * WORDS].view(np.int64)
        self._own = self._board[world.rank]
        self.deaths: list[dict[str, Any]] = []
        self.torn: list[Torn] = []
        self.told: Callable[[int, int], None] | None = None
        self._training = False
        self._buried: dict[int, dict[str, Any]] = {}  # on rank 0, as they happen
        self.star = Star(world.comm, self._bury)
        self.world = world
        self._renumber()
        failure.meet_by(self._all_leave)
        atexit.register(self._leave)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Until the ranks train a death ends the job: what they make together can't be made again."""
        try:
            yield
        except (RankDied, ConnectionError):
            os._exit(1)
        self._training = True
        if self._first.rank == 0:
            launched.now_training()

    # While the ranks train.

    def note(self, epoch: int, step: int, samples: int, updates: int, recorded: int) -> None:
        """How far this rank has come, for when it is dead."""
        self._own[:CALL] = epoch, step, samples, updates, recorded

    def fence(self, processes: dict[int, tuple[int, str]]) -> bool:
        """End ranks that hang, by their process ids and when those ``started``; False where the others can't go on so.

        A process that does not end although it was killed is waiting in the kernel, for a disk.
        """
        if 0 in processes or self._board[list(processes), FENCED].any():
            return False
        self._board[list(processes), FENCED] = 1
        for process, when in processes.values():
            fence(process, when)
        return True

    def _bury(self, rank: int, when: float) -> None:
        """On rank 0, at once, perhaps in a thread: nobody may wait for the dead rank's lock, clock or turn."""
        self._board[rank, GONE] = 1
        if self._board[rank, LEAVING]:
            return
        torn = self._store.bury(rank)
        shards = [of.shard for of in torn]
        self.torn += torn
        epoch, step, samples, updates, recorded = self._board[rank, :CALL].tolist()
        done = {"epoch": epoch, "step": step, "samples": samples, "updates": updates, "recorded": recorded, "shards": shards}
        if self._board[rank, FENCED]:
            done["cause"] = "hung, and was killed for it"
        if self._first.watch is not None:
            self._first.watch.signs.bury(rank)
        self._buried[rank] = {"rank": rank, "time": when} | done
        launched.note_death(self._buried[rank])
        if self.told is not None:
            self.told(rank, updates)
        at = time.strftime("%H:%M:%S", time.localtime(when))
        if not self._training:
            print(f"hpcasync: rank {rank} died at {at} before the ranks trained; the job ends", file=sys.stderr, flush=True)
            os._exit(1)
        held = ", ".join(map(str, shards))
        part = f"; it held the lock of shard {held}, whose last update may be applied in part" if shards else ""
        print(
            f"hpcasync: rank {rank} died at {at} in {launched.place_of(done)}{part}. The run goes on without it; "
            "the others take over its share of the data in the next epoch",
            file=sys.stderr,
            flush=True,
        )

    # Meetings.

    def together(self, meeting: Callable[[], T]) -> T:
        """Hold a meeting of the living, again from its start when somebody dies in it. Collective.

        Args:
            meeting: operations over the mode's world; may be called several times.
        """
        while True:
            try:
                return meeting()
            except RankDied:
                with idle(self._mode):  # those that still work must not wait for this rank's clock
                    self._regroup()
            except ConnectionError:
                print("hpcasync: rank 0, which holds the shared window, died; the job ends", file=sys.stderr, flush=True)
                os._exit(1)

    def call(self, meeting: int) -> None:
        """Ask everybody to come to this meeting after their present step."""
        self._board[0, CALL] = meeting + 1

    def called(self, meeting: int) -> bool:
        """Whether somebody has asked for it."""
        return bool(self._board[0, CALL] > meeting)

    def _regroup(self) -> None:
        star = self.star
        while True:
            star.shrink()
            try:
                self.deaths = star.bcast([d for rank, d in self._buried.items() if rank not in star.members])
            except RankDied:
                continue
            break
        self._renumber()

    def _renumber(self) -> None:
        star = self.star
        here: dict[str, Any] = {"rank": star.rank, "local_rank": star.rank, "size": star.size, "local_size": star.size}
        over: Collectives = OverStar(star)
        if self._first.watch is not None:
            over = WatchedCollectives(over, self._first.watch.signs)
        self.world = replace(self._first, **here, comm=star, node_comm=star, leaders=None, collectives=over)
        self._mode.world = self._mode.everyone = self.world
        self._store.regroup(self.world)

    def _leave(self) -> None:
        """At the process's end: MPI's own good-bye would wait for the dead. An error of some ranks still ends the job as ever."""
        code = failure.exit_code()
        fine = code in (0, signals.EXIT_CODE)
        if fine:
            self.together(self.star.Barrier)  # all are done: the launcher ends the job with rank 0
        elif not self._all_leave():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if fine:
            self.star.outlast()  # else rank 0 would take an end for a death
        os._exit(code)

    def _all_leave(self) -> bool:
        """Whether all that live leave with an error within ``MEET_SECONDS``."""
        self._own[LEAVING] = 1
        deadline = time.monotonic() + MEET_SECONDS
        while not (self._board[:, LEAVING] | self._board[:, GONE]).all():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
