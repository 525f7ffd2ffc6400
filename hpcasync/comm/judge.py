"""Who is missing when nothing moves: found from the ranks' signs of life, without any communication."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from hpcasync import proc
from hpcasync.comm.signs import (
    ANSWER,
    BEAT,
    BOUND,
    GRADIENTS,
    KINDS,
    LEFT,
    LOCK,
    MODELS,
    PHASE,
    PHASES,
    PID,
    STATE,
    STEPS,
    TURN,
    WAITS,
)

SILENT = 0.8
"""Part of the limit after which a rank that is not heard of counts as frozen, although it had come."""

QUIET = 0.3
"""Part of the limit after which it is told for how long a rank of another node is not heard of."""

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
        first = f"{named(here)} waited for {self.seconds:.1f} s in {where}"
        others = [f"{named(ranks)} in {place}" for place, ranks in self.waiting.items()][1:]
        if self.missing and self.kind:
            everyone = sorted(rank for ranks in self.waiting.values() for rank in ranks)
            text, others = f"{named(everyone)} waited for {self.seconds:.1f} s", []
            text += f" for {FREE[self.kind].format(named([*self.missing]))}"
        elif self.missing:
            has = "has" if len(self.missing) == 1 else "have"
            text = f"{named([*self.missing])} {has} not come to {where}, where {named(here)} waited for {self.seconds:.1f} s"
        else:
            text = f"{first}, and no rank is missing: either the ranks call different operations, or the network is down"
        text += "".join(f"; {other}" for other in others)
        if self.unheard:
            text += f"; of {named(self.unheard)} nothing is known: no datagrams (UDP) come from there"
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


def process_state(pid: int) -> str:
    """Of a process of this node: one letter, see proc(5); empty if there is no such process."""
    fields = proc.process_stat(pid)
    return fields[proc.STATE] if fields else "" if os.path.isdir("/proc/self") else "R"


def named(ranks: list[int]) -> str:
    """Such as ``rank 2``, ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
