"""The virtual machine: how fast each worker is, what the network and the store cost, who comes and goes when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcasync.errors import UsageError
from hpcasync.simulate.distributions import Distribution
from hpcasync.simulate.like import Recording
from hpcasync.simulate.units import bytes_per_second, seconds
from hpcasync.train.slow import of_worker

CHUNK = 256  # step times drawn at a time


@dataclass(frozen=True)
class Network:
    """Latency (s) and bandwidth (bytes/s) of one message; ``exchange``: measured seconds of an allreduce, in place of them."""

    latency: float = 0.0
    bandwidth: float = math.inf
    exchange: float | None = None

    def transfer(self, nbytes: int) -> float:
        """Seconds of one message."""
        return self.latency + nbytes / self.bandwidth

    def allreduce(self, nbytes: int, members: int) -> float:
        """Seconds of a ring allreduce: 2 (n-1) messages of ``nbytes / n``."""
        if members < 2:
            return 0.0
        if self.exchange is not None:
            return self.exchange
        return 2 * (members - 1) * (self.latency + nbytes / members / self.bandwidth)


@dataclass(frozen=True)
class Cluster:
    """Everything about the virtual machine that does not depend on the training.

    Attributes:
        workers: how many, the late ones included.
        compute: step times, per worker (one entry: the same for all).
        network: of a push, a pull, and the average of the synchronous modes.
        service: bytes per second at which the store applies a push to a shard; infinite costs nothing.
        slow: per worker, factor on its step times.
        changes: ``(seconds, worker, joins)``, in order of time.
        recording: of a live run, in place of ``compute``.
    """

    workers: int
    compute: tuple[Distribution, ...] = (Distribution("constant", 1.0),)
    network: Network = Network()
    service: float = math.inf
    slow: tuple[float, ...] = ()
    changes: tuple[tuple[float, int, bool], ...] = ()
    recording: Recording | None = None

    @property
    def meeting(self) -> float:
        """Seconds that the end of an epoch costs all workers."""
        return 0.0 if self.recording is None else self.recording.meeting

    def absent(self) -> set[int]:
        """Workers that are not there at the start: their first change is to join."""
        first: dict[int, bool] = {}
        for _, worker, joins in self.changes:
            first.setdefault(worker, joins)
        return {worker for worker, joins in first.items() if joins}


@dataclass
class StepTimes:
    """The step times of one worker: a stream of its own, so that they don't depend on what the others do.

    Attributes:
        communicate: seconds of the last step's messages, where they were recorded.
        wait: seconds that it waited for locks and for other ranks, where they were recorded.
    """

    cluster: Cluster
    worker: int
    seed: int
    communicate: float = 0.0
    wait: float = 0.0
    _drawn: list[float] = field(default_factory=list)
    _recorded: list[list[float]] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        kinds = self.cluster.compute
        self._kind = kinds[self.worker % len(kinds)]
        self._factor = self.cluster.slow[self.worker] if self.cluster.slow else 1.0
        self._rng = np.random.default_rng([self.seed, self.worker, 7])

    def next(self) -> float:
        """Seconds of the worker's next gradient."""
        if self.cluster.recording is not None:
            if not self._recorded:
                self._recorded = self.cluster.recording.draw(self.worker, self.seed, self._turn)[::-1].tolist()
                self._turn += 1
            compute, self.communicate, self.wait = self._recorded.pop()
            return self._factor * compute
        if not self._drawn:
            self._drawn = (self._factor * self._kind.sample(self._rng, CHUNK)).tolist()[::-1]
        return self._drawn.pop()


def parse_network(text: str, flag: str = "--network") -> Network:
    """``LATENCY,BANDWIDTH`` such as ``5us,10GB/s``; ``0,inf`` costs nothing.

    Raises:
        UsageError: it does not parse.
    """
    parts = text.split(",")
    if len(parts) != 2:
        raise UsageError(f"{flag}: {text!r}: expected LATENCY,BANDWIDTH such as 5us,10GB/s")
    return Network(seconds(parts[0], flag), bytes_per_second(parts[1], flag))


def parse_changes(fail: Sequence[str], join: Sequence[str], workers: int) -> tuple[tuple[float, int, bool], ...]:
    """Failures and joins from ``RANK@SECONDS`` items, in order of time.

    Raises:
        UsageError: it does not parse, no such worker, a worker that fails or joins twice in a row, nobody at the start.
    """
    changes: list[tuple[float, int, bool]] = []
    for flag, items, joins in (("--fail", fail, False), ("--join", join, True)):
        for item in items:
            worker, when = of_worker(item, "@", flag, "RANK@SECONDS such as 2@10", workers)
            changes.append((seconds(when, f"{flag} {item}"), worker, joins))
    changes.sort()
    last: dict[int, bool] = {}
    for at, worker, joins in changes:
        if last.get(worker) == joins:
            what, other = ("joins", "failing") if joins else ("fails", "joining again")
            raise UsageError(f"worker {worker} {what} at {at:g} s without {other} in between")
        last[worker] = joins
    result = tuple(changes)
    if len(Cluster(workers, changes=result).absent()) == workers:
        raise UsageError(f"--join: all {workers} workers join late; expected at least one at the start")
    return result
