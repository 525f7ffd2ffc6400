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
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from hpcasync import launched, proc
from hpcasync.comm.shared_memory import shared_rows
from hpcasync.comm.signs import (
    ANSWER,
    BEAT,
    BOUND,
    ENDED,
    ENDING,
    GRADIENTS,
    KINDS,
    LEFT,
    LOCK,
    MADE,
    MODELS,
    OPERATIONS,
    PHASE,
    PHASES,
    PID,
    STATE,
    STEPS,
    TOLD,
    TURN,
    WAITS,
    WORDS,
    Signs,
)
from hpcasync.comm.watched import WatchedCollectives
from hpcasync.comm.world import World

EXIT_CODE = 76
"""Of a job that has stalled; with a checkpoint, if it says so."""

SILENT = 0.8
"""Part of the limit after which a rank that is not heard of counts as frozen, although it had come."""

QUIET = 0.3
"""Part of the limit after which it is told for how long a rank of another node is not heard of."""

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

FREE = {
    LOCK: "a shard's lock that {} holds",
    TURN: "a turn that {} does not take",
    BOUND: "{}, behind the bound on staleness",
    ANSWER: "another node's answer, perhaps that of {}",
}
"""What ranks wait for outside operations of all, and whom they wait for."""


@dataclass(frozen=True)
class Stall:
    """What the ranks were at when nothing moved.

    Attributes:
        seconds: for so long.
        waiting: per operation the ranks that wait in it, that of the rank that tells it first.
        missing: per other rank what is known of it.
        alive: those of them whose watch thread is at work.
        unheard: ranks of which nothing is known: no datagram has come.
        kind: what ranks wait for of ``FREE``, the first there in its order; 0 if nothing.
    """

    seconds: float
    waiting: dict[str, list[int]]
    missing: dict[int, str]
    alive: list[int]
    unheard: list[int]
    kind: int = 0

    def __str__(self) -> str:
        where, here = next(iter(self.waiting.items()))
        first = f"{_ranks(here)} waited for {self.seconds:.1f} s in {where}"
        others = [f"{_ranks(ranks)} in {place}" for place, ranks in self.waiting.items()][1:]
        if self.missing and self.kind:
            everyone = sorted(rank for ranks in self.waiting.values() for rank in ranks)
            text, others = f"{_ranks(everyone)} waited for {self.seconds:.1f} s", []
            text += f" for {FREE[self.kind].format(_ranks([*self.missing]))}"
        elif self.missing:
            has = "has" if len(self.missing) == 1 else "have"
            text = f"{_ranks([*self.missing])} {has} not come to {where}, where {_ranks(here)} waited for {self.seconds:.1f} s"
        else:
            text = f"{first}, and no rank is missing: either the ranks call different operations, or the network is down"
        text += "".join(f"; {other}" for other in others)
        if self.unheard:
            text += f"; of {_ranks(self.unheard)} nothing is known: no datagrams (UDP) come from there"
        return text + "".join(f"\n  rank {rank}{what}" for rank, what in self.missing.items())


def judge(
    lines: np.ndarray,
    silent: np.ndarray,
    states: dict[int, str],
    places: list[tuple[int, str]],
    me: int,
    seconds: float,
    free: bool = False,
) -> Stall | None:
    """Who is missing, if this rank is the one to act: the lowest of those that wait and live.

    Args:
        lines: of all ranks, see ``hpcasync.comm.signs``.
        silent: per rank, seconds since its watch thread was last heard.
        states: of the processes of this node, by rank, as in ``/proc/<pid>/stat``; empty for one that has gone.
        places: per rank its node and the node's name.
        me: this rank.
        seconds: for so long nothing has moved.
        free: the ranks make their steps independently of each other, so an operation is the same after any step.
    """
    stopped = {rank for rank, state in states.items() if state in ("", "T", "t", "Z", "X")}
    ranks = [r for r in range(len(lines)) if lines[r, STATE] != LEFT]
    unheard = [r for r in ranks if lines[r, BEAT] == 0 and r not in stopped]
    frozen = {r for r in ranks if r in stopped or silent[r] >= SILENT * seconds}
    here = [r for r in ranks if lines[r, WAITS] and r not in frozen]
    if not here or here[0] != me:
        return None
    waiting: dict[str, list[int]] = {}
    for rank in here:
        waiting.setdefault(_operation(lines[rank], free), []).append(rank)
    missing = {}
    for rank in ranks:
        if rank not in here and rank not in unheard:
            what = _state(states.get(rank), rank in frozen, float(silent[rank]) if silent[rank] >= QUIET * seconds else 0.0)
            at = _operation(lines[rank], free) if lines[rank, WAITS] else _work(lines[rank])
            missing[rank] = f" (process {lines[rank, PID]} on {places[rank][1]}): {what}, in {at}"
    kind = next((kind for kind in FREE if kind in lines[here, WAITS]), 0)
    return Stall(seconds, waiting, missing, [r for r in missing if r not in frozen], unheard, kind)


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
        states = {r: _process_state(int(lines[r, PID])) for r in here}
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
                f"hpcasync: warning: no datagrams (UDP) come from {_ranks(unheard)} on other nodes; should one of them hang, the "
                "job ends all the same, but it is not named"
            )
        return bool(unheard)


def _operation(line: np.ndarray, free: bool) -> str:
    """What a rank waits in."""
    phase, kind, steps = (int(line[word]) for word in (PHASE, WAITS, STEPS))
    if free:
        return PHASES[phase] if phase and kind not in FREE else KINDS[kind]
    if phase:
        return f"{PHASES[phase]} after step {steps}"
    return f"{KINDS[kind]} of step {steps + 1}" if kind in (GRADIENTS, MODELS) else f"{KINDS[kind]} after step {steps}"


def _work(line: np.ndarray) -> str:
    """What a rank is at that does not wait."""
    phase, steps = int(line[PHASE]), int(line[STEPS])
    return f"{PHASES[phase]} after step {steps}" if phase else f"step {steps + 1}"


def _state(state: str | None, frozen: bool, silent: float) -> str:
    if state is None and not frozen:
        return f"heard of last {silent:.1f} s ago" if silent else "alive"
    if state is None:
        return "no sign of life from there: it is stopped, or its node or network is down"
    if state == "" or state in "ZX":
        return "dead"
    if state in "Tt":
        return "stopped by a signal or a debugger"
    if state == "D":
        return "in the kernel, waiting for a disk or a network file system"
    return "no sign of life: in code that keeps Python's lock" if frozen else "alive"


def _process_state(pid: int) -> str:
    """One letter, see proc(5); empty if there is no such process."""
    fields = proc.process_stat(pid)
    return fields[proc.STATE] if fields else "" if os.path.isdir("/proc/self") else "R"


def _ranks(ranks: list[int]) -> str:
    """``rank 2``, ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _say(text: str) -> None:
    """In one write, so that ranks do not interleave."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except Exception:  # a closed stream must not keep the job from ending
        pass
