"""Shows what all ranks do while they train: on a terminal, and for TensorBoard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from hpcasync.comm import together
from hpcasync.modes import Mode
from hpcasync.stats import Staleness
from hpcasync.train.board import Board
from hpcasync.train.event_file import EventFiles
from hpcasync.train.live_row import Row, State, living, mean_loss, middle, slowest
from hpcasync.train.screen import Facts
from hpcasync.train.terminal import Terminal, find_terminal

TELL_SECONDS = 0.5
"""A rank writes its row so often."""
WINDOW = 10
"""Rows whose time the rates, shares and staleness of a row are about."""
POINT_SECONDS = 2.0
"""Between two points of TensorBoard's curves while the ranks train."""
CURVES = 64
"""Ranks that have curves of their own, at most."""


class _Mark(NamedTuple):
    """Where a rank was: sums from the start on."""

    seconds: float
    communicate: float
    wait: float
    steps: int
    samples: int
    losses: float
    counts: np.ndarray


class Monitor:
    """Shows every rank's speed, loss, staleness and use of time while they train, and marks the slowest.

    The ranks tell of themselves twice a second through shared memory; none waits for another, nothing collective happens
    in a step. Constructor and ``close`` are collective. A context manager, which closes at its end.

    Args:
        mode: the optimizer.
        live: a view on the terminal that the run was started from, also through mpiexec; nothing where there is none.
        tensorboard: folder for event files, written by rank 0; a folder ``rank<N>`` in it for each of up to 64 ranks.
        title: of the view.
        steps: of each rank in the whole run; 0 where it is not known.
        epochs: of the whole run.

    Attributes:
        shown: whether there is a live view.

    Raises:
        UsageError: on every rank: the package for TensorBoard is missing, its folder can't be made, too little shared memory.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        live: bool = False,
        tensorboard: str | Path | None = None,
        title: str = "",
        steps: int = 0,
        epochs: int = 0,
    ) -> None:
        self._mode, self._world = mode, mode.everyone
        first = self._world.rank == 0
        terminal = find_terminal(sys.stderr) if live and first else None
        self._files = together(self._world, lambda: EventFiles(Path(tensorboard)) if tensorboard is not None and first else None)
        self.shown = self._world.gather(terminal is not None)[0]
        self._board = Board(self._world) if self.shown or tensorboard is not None else None
        facts = Facts(title or mode.mode, self._world.size, steps, epochs, terminal.owner if terminal else 0)
        self._screen = _start_screen(self._board, facts, terminal) if self._board and terminal else None
        self._samples, self._losses, self._steps, self._epoch = 0, 0.0, 0, 1
        self._gone = 0.0
        self._marks = deque([self._mark()], WINDOW)
        self._next = self._pointed = 0.0

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:  # the others may never come
            self._leave()

    def step(self, loss: float, samples: int, epoch: int = 1) -> None:
        """Tell of a step of this rank.

        Args:
            loss: mean over its samples.
            samples: their number.
            epoch: from 1.
        """
        if self._board is None:
            return
        self._samples += samples
        self._losses += loss * samples
        self._steps += 1
        self._epoch = epoch
        now = time.monotonic()
        if now >= self._next:
            self._tell(State.TRAINS, now)
            if now - self._pointed > POINT_SECONDS:
                self._point(now)

    def meets(self) -> None:
        """Tell that this rank has come to the end of an epoch, or does something else than training; a step ends that."""
        if self._board is not None:
            self._tell(State.MEETS, time.monotonic())
            self._next = 0.0

    def died(self, rank: int, updates: float | None = None) -> None:
        """Tell of a rank that has died, by its number at the start; rank 0 tells. From any thread.

        Args:
            rank: that died.
            updates: that it had made; None for as many as it has told of.
        """
        board = self._board
        if board is not None and self._world.rank == 0:
            board.bury(rank, updates)

    def resumed(self, steps: int, gone: float = 0) -> None:
        """Tell that the run goes on after so many steps of this rank. Collective.

        Args:
            steps: of this rank.
            gone: updates of ranks that have died before.
        """
        self._steps, self._gone = steps, gone
        self._marks = deque([self._mark()], WINDOW)
        if self._board is not None:
            self._tell(State.STARTS, time.monotonic())
        self._next = 0.0
        updates = self._sum(self._world.gather(float(self._mode.updates)))
        if self._files is not None:
            self._files.purge(updates + 1)

    def scalars(self, values: Mapping[str, float], updates: float | None = None) -> None:
        """Write a point of other curves, such as an accuracy, and one of the ranks' curves; rank 0 writes.

        Args:
            values: by tag.
            updates: place on the axis; None for all that the ranks have told of.
        """
        if self._files is not None:
            told = self._point(time.monotonic())
            self._files.scalars(values, told if updates is None else updates)

    def text(self, tag: str, text: str) -> None:
        """Write a text in Markdown for TensorBoard; rank 0 writes."""
        if self._files is not None:
            self._files.text(tag, text)

    def close(self) -> None:
        """End the view and the event files. Collective; nothing on a second call."""
        if self._board is not None:
            self._tell(State.ENDED, time.monotonic())
            self._board.close()
        self._leave()

    def _leave(self) -> None:
        self._board = None
        if self._screen is not None:
            assert self._screen.stdin is not None
            self._screen.stdin.close()
            try:  # what comes next is for the whole terminal
                self._screen.wait(5)
            except subprocess.TimeoutExpired:  # the user holds the terminal (Ctrl-S)
                self._screen.kill()
            if self._screen.returncode:
                print("hpcasync: warning: the live view could not be drawn to its end", file=sys.stderr, flush=True)
            self._screen = None
        if self._files is not None:
            self._files.close()
            self._files = None

    def _tell(self, state: State, now: float) -> None:
        assert self._board is not None
        old, new = self._marks[0], self._mark()
        self._marks.append(new)
        seconds, samples = new.seconds - old.seconds, new.samples - old.samples
        communicate, wait = new.communicate - old.communicate, new.wait - old.wait
        stale = Staleness(new.counts - np.pad(old.counts, (0, new.counts.size - old.counts.size))).summary()
        per_second = 1 / seconds if seconds > 0 else 0.0
        row = Row(
            time=now,
            pause=seconds / max(1, new.steps - old.steps),
            state=state,
            epoch=self._epoch,
            steps=self._steps,
            updates=self._mode.updates,
            loss=(new.losses - old.losses) / samples if samples else 0.0,
            speed=samples * per_second,
            compute=max(0.0, seconds - communicate - wait) * per_second,
            communicate=communicate * per_second,
            wait=wait * per_second,
            staleness=stale["p50"],
            staleness_max=stale["max"],
        )
        self._board.write(row)
        self._next = now + TELL_SECONDS

    def _mark(self) -> _Mark:
        share = self._mode.share
        counts = self._mode.staleness.counts.copy()
        return _Mark(share.seconds, share.communicate + share.copy, share.wait, self._steps, self._samples, self._losses, counts)

    def _point(self, now: float) -> float:
        """Write a point of all ranks' curves; the updates that they have told of."""
        if self._files is None or self._board is None:
            return 0.0
        rows = self._board.read()
        updates = self._sum([row.updates for row in rows])
        alive = living(rows)
        if not all(row.time for row in alive):  # the sum is less than what is known later
            return updates
        self._pointed = now
        slow = slowest(rows, now)
        self._files.scalars(_curves(alive) | ({} if slow is None else {"speed/slowest_rank": slow}), updates)
        for rank, row in enumerate(rows if 1 < len(rows) <= CURVES else []):
            if row.state != State.DIED:
                self._files.scalars(_curves([row]), updates, f"rank{rank}")
        return updates

    def _sum(self, updates: list[float]) -> float:
        return updates[0] if self._mode.mode == "sync" else sum(updates) + self._gone


def _curves(rows: Sequence[Row]) -> dict[str, float]:
    """Points of what one rank, or all together, have told."""
    return {
        "loss/recent": mean_loss(rows),
        "speed/samples_per_second": sum(row.speed for row in rows),
        "staleness/median": middle([row.staleness for row in rows]),
        "staleness/max": max(row.staleness_max for row in rows),
        "time/compute": sum(row.compute for row in rows) / len(rows),
        "time/communicate": sum(row.communicate for row in rows) / len(rows),
        "time/wait": sum(row.wait for row in rows) / len(rows),
    }


def _start_screen(board: Board, facts: Facts, terminal: Terminal) -> subprocess.Popen[bytes]:
    """The process that draws; it ends when its standard input is closed, and so when this process dies."""
    command = [sys.executable, "-m", "hpcasync.train.screen", str(board.descriptor), json.dumps(asdict(facts))]
    # Not among the ranks that a launcher kills at its end: it still has to give the terminal back. No session of theirs either.
    env = {name: value for name, value in os.environ.items() if not name.startswith("HPCASYNC_LAUNCH")}
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=terminal.descriptor,
            stderr=subprocess.DEVNULL,
            pass_fds=(board.descriptor,),
            start_new_session=True,
            env=env,
        )
    finally:
        os.close(terminal.descriptor)
