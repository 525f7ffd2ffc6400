"""Work ahead: what is certain to be needed is computed by helper threads, the soonest needed first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
J = TypeVar("J")

AHEAD = 4
"""Results that may lie ready: enough to bridge a push, few enough to stay in the caches."""


class Ahead(Generic[J, T]):
    """Jobs of numbered owners, one at a time each; whoever takes a result computes it if no helper has begun.

    Who computes what depends on chance, the results must not: ``work`` is a function of the job alone.

    Args:
        work: ``work(lane, owner, job)``; lane 0 is the thread that calls ``take``, the helpers are 1 and up.
        helpers: threads beside it.
    """

    def __init__(self, work: Callable[[int, int, J], T], helpers: int) -> None:
        self._work = work
        self._waiting: dict[int, tuple[float, J]] = {}
        self._order: list[tuple[float, int]] = []  # heap; entries of jobs that are no longer waiting are void
        self._running: set[int] = set()
        self._ready: dict[int, T | BaseException] = {}
        self._change = threading.Condition()
        self._held = self._closing = False
        self._threads = [threading.Thread(target=self._help, args=(i + 1,), daemon=True) for i in range(helpers)]
        for thread in self._threads:
            thread.start()

    def request(self, owner: int, job: J, when: float) -> None:
        """Ask for a result that is needed at ``when``, by the order of which the helpers go."""
        with self._change:
            self._waiting[owner] = when, job
            if self._threads:
                heapq.heappush(self._order, (when, owner))
                self._change.notify()

    def take(self, owner: int) -> T:
        """The result of the owner's job; raises what ``work`` raised, and KeyError where nothing was asked for."""
        while True:
            with self._change:
                if owner in self._ready:
                    found = self._ready.pop(owner)
                    self._change.notify()
                    break
                mine = owner
                if owner in self._running:
                    other = self._next()
                    if other is None:
                        self._change.wait()
                        continue
                    mine = other
                job = self._waiting.pop(mine)[1]
            found = self._run(0, mine, job)
            if mine == owner:
                break
            with self._change:
                self._ready[mine] = found
        if isinstance(found, BaseException):
            raise found
        return found

    def cancel(self, owner: int) -> None:
        """Forget the owner's job."""
        with self._change:
            self._waiting.pop(owner, None)
            self._change.wait_for(lambda: owner not in self._running)
            self._ready.pop(owner, None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No helper works during the ``with`` body."""
        with self._change:
            self._held = True
            self._change.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._change:
                self._held = False
                self._change.notify_all()

    def close(self) -> None:
        """End the helpers."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> int | None:
        """The waiting job that is needed soonest."""
        while self._order:
            when, owner = heapq.heappop(self._order)
            if owner in self._waiting and self._waiting[owner][0] == when:
                return owner
        return None

    def _run(self, lane: int, owner: int, job: J) -> T | BaseException:
        try:
            return self._work(lane, owner, job)
        except BaseException as error:  # for whoever takes it
            return error

    def _help(self, lane: int) -> None:
        while True:
            with self._change:
                owner = None
                while not self._closing:
                    if not self._held and len(self._ready) < AHEAD:
                        owner = self._next()
                    if owner is not None:
                        break
                    self._change.wait()
                if owner is None:
                    return
                job = self._waiting.pop(owner)[1]
                self._running.add(owner)
            found = self._run(lane, owner, job)
            with self._change:
                self._running.discard(owner)
                self._ready[owner] = found
                self._change.notify_all()
