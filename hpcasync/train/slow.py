"""Artificially slow ranks: stragglers to measure with, live; the simulator reads the same flag."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpcasync.errors import UsageError

if TYPE_CHECKING:
    from hpcasync.modes import Mode


def parse_slow(items: Sequence[str], workers: int | None, *, least: float = 0.0) -> tuple[float, ...]:
    """Factors of all workers from ``RANK:FACTOR`` items.

    Args:
        items: of ``--slow``.
        workers: how many there are; None: not known yet.
        least: a factor below it is refused.

    Raises:
        UsageError: it does not parse, no such worker, a factor not above 0, a worker named twice.
    """
    factors: dict[int, float] = {}
    for item in items:
        worker, value = of_worker(item, ":", "--slow", "RANK:FACTOR such as 3:4.0", workers)
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor) or factor <= 0:
            raise UsageError(f"--slow {item}: expected RANK:FACTOR with a factor > 0")
        if factor < least:
            raise UsageError(f"--slow {item}: a live rank can only be made slower; expected a factor >= {least:g}")
        if worker in factors:
            raise UsageError(f"--slow {item}: worker {worker} has a factor already")
        factors[worker] = factor
    return tuple(factors.get(worker, 1.0) for worker in range(workers or 0))


def of_worker(item: str, mark: str, flag: str, form: str, workers: int | None) -> tuple[int, str]:
    """The worker before ``mark``, and what comes after it.

    Raises:
        UsageError: not of the ``form``; no such worker.
    """
    number, found, value = item.partition(mark)
    if not found or not value or not number.isdecimal():
        raise UsageError(f"{flag} {item}: expected {form}")
    worker = int(number)
    if workers is not None and worker >= workers:
        raise UsageError(f"{flag} {item}: no worker {worker}; {workers} workers are 0 to {workers - 1}")
    return worker, value


class Slowdown:
    """From now on this rank computes ``factor`` times longer: after a gradient it sleeps, and takes no core from others.

    It sleeps before the step of ``mode``, so that a gradient is then as old as that of a slow rank, and that counts as computing.
    """

    def __init__(self, mode: Mode, factor: float) -> None:
        self._share, self._factor = mode.share, factor
        self._last = mode.share.compute
        mode.register_step_pre_hook(self._before)
        mode.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        time.sleep((self._factor - 1) * (self._share.compute - self._last))
        self._last = self._share.compute  # a step inside this one is no new gradient

    def _after(self, *_: Any) -> None:
        self._last = self._share.compute
