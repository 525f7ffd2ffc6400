"""Where the time of a step went, and how stale the gradients were."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

Phase = Literal["communicate", "wait", "copy"]


class TimeShare:
    """Seconds of this rank by what it did: compute, communicate, wait; with a model on a GPU also copy.

    The clock runs between ``start()`` and ``stop()``; what is not spent in a ``phase`` counts as compute. Copies between a GPU
    and the host count as far as the host waited for them.
    """

    def __init__(self) -> None:
        self.communicate = 0.0
        self.wait = 0.0
        self.copy = 0.0
        self._total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Let the clock run (no effect when it does)."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, for evaluation and the like."""
        self._total = self.seconds
        self._since = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the ``with`` body as ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: Phase, seconds: float) -> None:
        """Count ``seconds`` as ``name``, if the clock is running."""
        if self._since is not None:
            setattr(self, name, getattr(self, name) + seconds)

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._total + running

    @property
    def running(self) -> bool:
        """Whether the clock runs."""
        return self._since is not None

    def load(self, seconds: float, communicate: float, wait: float, copy: float = 0.0) -> None:
        """Go on from these seconds of an earlier process; the clock stands."""
        self._total, self._since = seconds, None
        self.communicate, self.wait, self.copy = communicate, wait, copy

    @property
    def compute(self) -> float:
        """Seconds not spent in communication, waiting or copies."""
        return max(0.0, self.seconds - self.communicate - self.wait - self.copy)

    def shares(self) -> dict[str, float]:
        """Fractions of the clock: compute, communicate, wait, of a GPU copy; they add up to 1 (all 0 before the start)."""
        parts = {"compute": self.compute, "communicate": self.communicate, "wait": self.wait}
        parts |= {"copy": self.copy} if self.copy else {}
        total = sum(parts.values())
        return {k: v / total if total else 0.0 for k, v in parts.items()}


def parts_of(ranks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the ranks' ``share`` is divided into: ``copy`` only where a model was on a GPU."""
    return ("compute", "communicate", "wait", *(("copy",) if any("copy" in rank["share"] for rank in ranks) else ()))


class Staleness:
    """A histogram of staleness: updates that others applied to a shard between a rank's read and its write."""

    def __init__(self, counts: np.ndarray | None = None) -> None:
        self.counts = np.zeros(64, np.int64) if counts is None else counts

    def add(self, tau: int) -> None:
        """Count one push to one shard."""
        if tau >= self.counts.size:
            self.counts = np.pad(self.counts, (0, max(self.counts.size, tau + 1 - self.counts.size)))
        self.counts[tau] += 1

    def merge(self, other: Staleness) -> Staleness:
        """The histogram of both."""
        size = max(self.counts.size, other.counts.size)
        mine, theirs = (np.pad(c, (0, size - c.size)) for c in (self.counts, other.counts))
        return Staleness(mine + theirs)

    def summary(self) -> dict[str, float]:
        """``mean``, ``p50``, ``p95`` and ``max`` in updates; all 0 for an empty histogram."""
        total = int(self.counts.sum())
        if not total:
            return {"mean": 0.0, "p50": 0, "p95": 0, "max": 0}
        below = np.cumsum(self.counts)

        def quantile(q: float) -> int:
            return int(np.searchsorted(below, q * total))

        mean = float(self.counts @ np.arange(self.counts.size)) / total
        return {"mean": mean, "p50": quantile(0.5), "p95": quantile(0.95), "max": int(np.nonzero(self.counts)[0][-1])}


INTERVAL_LEAST = 6
"""Values from which there is an interval of 95 % for the median."""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The median, and the order statistics between which that of the population lies with at least this confidence.

    No distribution is assumed. With fewer than six values no pair of them reaches 95 %: the extremes are given then.

    Args:
        values: at least one.
        level: the confidence.

    Returns:
        Median, low, high.
    """
    ordered = sorted(values)
    n, below, k = len(ordered), 0.0, 0
    while k < (n - 1) // 2 and 2 * (below + math.comb(n, k) / 2**n) <= 1 - level:
        below += math.comb(n, k) / 2**n
        k += 1
    k = max(0, k - 1)
    return float(np.median(ordered)), float(ordered[k]), float(ordered[n - 1 - k])
