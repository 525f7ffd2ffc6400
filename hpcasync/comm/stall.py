"""A rank that hangs is named, what can be saved is saved, and the job ends: a thread of each rank, which needs no MPI.

A job has stalled when some rank waits for others and for a time no rank has moved: come to an operation, back from one, or made
a step. The lowest of the ranks that wait acts for all.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import numpy as np

from hpcasync import launched
from hpcasync.comm.judge import Stall, judge, named, process_state
from hpcasync.comm.shared_memory import shared_rows
from hpcasync.comm.signs import (
    BEAT,
    ENDED,
    ENDING,
    LEFT,
    MADE,
    OPERATIONS,
    PID,
    STATE,
    STEPS,
    TOLD,
    WAITS,
    WORDS,
    Signs,
)
from hpcasync.comm.watched import WatchedCollectives
from hpcasync.comm.world import World

EXIT_CODE = 76
"""Of a job that has stalled; with a checkpoint, if it says so."""

FIRST, FIRST_SECONDS = 10, 1800.0
"""Until every rank has made a step the limit is so many times as long, but at most so many seconds: compilation, data."""

SAVE_SECONDS = 600.0
"""How long a checkpoint may take then."""

TELL_SECONDS = 5.0
"""How long the missing ranks that live have to say where they are."""

ENDING_SECONDS = 60.0
"""So long another rank waits for the end by one that has begun it and is silent since: an abort takes its time across nodes."""

ABORT_SECONDS = 5.0
"""After so long without effect of MPI's abort the process ends itself."""

FRAMES = 8


class Watch:
    """Watches the ranks of ``world`` until ``close``. The constructor is collective.

    Args:
        world: several ranks.
        seconds: nothing may stand still for so long.

    Attributes:
        world: the same ranks, leaving signs in all they do together.

    Raises:
        UsageError: the same on every rank: shared memory too small.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.signs = signs = Signs(world, shared_rows(world, 8 * WORDS))
        self.world = replace(world, watch=self, collectives=WatchedCollectives(world.collectives, signs))
        self._seconds = seconds
        self._tick = min(1.0, seconds / 20)
        self._save: Callable[[], str] = lambda: "Nothing had begun that could be saved."
        self._told: Callable[[list[int]], None] = lambda missing: None
        self._guilty: Callable[[int, list[int]], list[int]] | None = None
        self._fence: Callable[[list[int]], bool] | None = None
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hpcasync-stall", daemon=True)
        self._thread.start()

    def begin(
        self,
        steps: int,
        save: Callable[[], str],
        told: Callable[[list[int]], None] | None = None,
        guilty: Callable[[int, list[int]], list[int]] | None = None,
        fence: Callable[[list[int]], bool] | None = None,
    ) -> None:
        """From here on there is something to save.

        Args:
            steps: made so far.
            save: called in another thread while this one is held in an operation; saves what this rank has, without the
                others, and returns a sentence on it.
            told: called on the rank that ends the job with the ranks that hang.
            guilty: for ranks that make their steps independently of each other: given what is waited for, a key of ``FREE``
                or 0, and the ranks that do not wait, those for which the others do.
            fence: ends these ranks, after which the others go on; False if they cannot.
        """
        self.signs.say(STEPS, steps)
        self._save, self._told, self._guilty, self._fence = save, told or self._told, guilty, fence

    def close(self) -> None:
        """Leave: nobody is to wait for this rank. Idempotent."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self.signs.close()

    def _run(self) -> None:
        signs, tick = self.signs, self._tick
        lines = signs.lines()
        silent = np.zeros(len(lines))
        quiet, last, told, unheard = 0.0, time.monotonic(), False, False
        while not self._stop.wait(tick):
            # What this process slept through, stopped by a signal or for lack of a core, is nobody's fault.
            gap, last = time.monotonic() - last, time.monotonic()
            passed = min(gap, 2 * tick)
            signs.beat()
            before, lines = lines, signs.lines()
            silent = np.where(lines[:, BEAT] != before[:, BEAT], 0.0, silent + passed)
            moved = (lines[:, OPERATIONS:PID] != before[:, OPERATIONS:PID]).any()
            quiet = 0.0 if moved else quiet + passed
            if not unheard and silent.max() > 30 * tick and signs.rank == 0:
                unheard = self._warn_of_unheard(lines)
            if signs.hold:
                continue
            ends = np.flatnonzero((lines[:, STATE] == ENDING) & (silent < max(self._seconds, ENDING_SECONDS)))
            if any(signs.places[r][0] != signs.node for r in np.flatnonzero(lines[:, STATE] == ENDED)):
                # MPICH's mpiexec sends other nodes a SIGTERM only, which a run takes for a wish to stop.
                self._abort()
            elif ends.size:
                if not told and gap < self._seconds:  # one that was stopped need not say where it is
                    self._show(lines)
                told = True
            elif quiet >= self._limit(lines):
                quiet = self._act(lines, silent, quiet)

    def _limit(self, lines: np.ndarray) -> float:
        known = (lines[:, STATE] != LEFT) & (lines[:, BEAT] > 0)
        if lines[known, MADE].min(initial=1) > 0:
            return self._seconds
        return max(self._seconds, min(FIRST * self._seconds, FIRST_SECONDS))

    def _act(self, lines: np.ndarray, silent: np.ndarray, quiet: float) -> float:
        """If this rank is the one to do so: hold it where it is and end the job, or end the ranks that the others wait for.

        Returns:
            For how long nothing has moved.
        """
        signs = self.signs
        here = [r for r, (node, _) in enumerate(signs.places) if node == signs.node]
        states = {r: process_state(int(lines[r, PID])) for r in here}
        stall = judge(lines, silent, states, signs.places, signs.rank, quiet, free=self._guilty is not None)
        if stall is None:
            return quiet
        if self._guilty is not None and stall.missing:
            guilty = self._guilty(stall.kind, list(stall.missing))
            if not guilty and quiet < 2 * self._limit(lines):
                return quiet  # what was held has just been given free
            missing = {rank: what for rank, what in stall.missing.items() if rank in guilty or not guilty}
            stall = replace(stall, missing=missing, alive=[rank for rank in stall.alive if rank in missing])
            if (signs.lines()[:, OPERATIONS:PID] != lines[:, OPERATIONS:PID]).any():
                return 0.0  # somebody has gone on just now
            if guilty and self._fence is not None and self._fenced(stall):
                return 0.0
        signs.hold = True
        now = signs.lines()[signs.rank]
        if not now[WAITS] or now[OPERATIONS] != lines[signs.rank, OPERATIONS]:
            signs.hold = False  # it has gone on just now
            return quiet
        signs.say(STATE, ENDING)
        threading.Thread(target=self._end, args=(stall,), name="hpcasync-stall-end", daemon=True).start()
        return quiet

    def _fenced(self, stall: Stall) -> bool:
        assert self._fence is not None
        if not self._fence(list(stall.missing)):
            return False
        one = len(stall.missing) == 1
        _say(f"hpcasync: stalled: {stall}\nhpcasync: {'it is' if one else 'they are'} killed, so as not to wake and write")
        return True

    def _end(self, stall: Stall) -> None:
        _say(f"hpcasync: stalled: {stall}")
        self._told(list(stall.missing))
        said: list[str] = []
        saver = threading.Thread(target=lambda: said.append(self._saved()), name="hpcasync-stall-save", daemon=True)
        saver.start()
        saver.join(SAVE_SECONDS)
        deadline = time.monotonic() + TELL_SECONDS
        while (self.signs.lines()[stall.alive, STATE] != TOLD).any() and time.monotonic() < deadline:
            time.sleep(self._tick)
        text = said[0] if said else f"No checkpoint: not written within {SAVE_SECONDS:g} s."
        _say(f"hpcasync: {text} The job ends with exit code {EXIT_CODE}.")
        self.signs.say(STATE, ENDED)
        time.sleep(3 * self._tick)
        self._abort()

    def _abort(self) -> NoReturn:
        from mpi4py import MPI

        launched.note_abort(EXIT_CODE)
        # Through its address: mpi4py's keeps Python's lock, and a thread of another library may keep MPI's.
        comm = ctypes.c_void_p(MPI._handleof(self.world.comm))
        abort = threading.Thread(target=ctypes.CDLL(MPI.__file__).MPI_Abort, args=(comm, EXIT_CODE), daemon=True)
        abort.start()
        abort.join(ABORT_SECONDS)
        os._exit(EXIT_CODE)

    def _saved(self) -> str:
        try:
            return self._save()
        except Exception as error:
            return f"No checkpoint: {error}; the one before stays."

    def _show(self, lines: np.ndarray) -> None:
        """Tell where this rank is if it is missing elsewhere."""
        if not lines[self.signs.rank, WAITS]:
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)[-FRAMES:])
            _say(f"hpcasync: rank {self.signs.rank} is missing in an operation; it is here:\n{stack}".rstrip())
        self.signs.say(STATE, TOLD)

    def _warn_of_unheard(self, lines: np.ndarray) -> bool:
        unheard = np.flatnonzero(lines[:, BEAT] == 0).tolist()
        if unheard:
            _say(
                f"hpcasync: warning: no datagrams (UDP) come from {named(unheard)} on other nodes; should one of them hang, the "
                "job ends all the same, but it is not named"
            )
        return bool(unheard)


def _say(text: str) -> None:
    """In one write, so that ranks do not interleave."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except Exception:  # a closed stream must not keep the job from ending
        pass
