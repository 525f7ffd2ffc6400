"""Who makes MPI's one-sided operations go on while a rank computes: a thread that needs no GIL.

Over software networks a put, a get and an atomic wait until the target enters MPI. The thread runs a compiled loop that calls
``MPI_Iprobe`` through its address between short sleeps, and comes back to Python only when a request has arrived.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcasync.backoff import Backoff
from hpcasync.kernels.watch import watch

PROBES = 16
"""Calls of ``MPI_Iprobe`` per turn: each moves one message on, a request takes several."""

SLEEP, SHORT_SLEEP = 1000, 100
"""Microseconds between turns: at 1 ms the thread costs 1-3 % of a core, at 0.1 ms 6-17 %; short after a request, since the
sender's next operations are on their way."""

EAGER_TURNS = 30
"""Turns with the short sleep after a request."""


def _mpi_library() -> ctypes.CDLL:
    from mpi4py import MPI

    return ctypes.CDLL(MPI.__file__)  # a look-up in the extension module finds the library that it is linked with


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache  # the first one asks before any thread switches
def _yield_switch() -> int:
    """Address of Open MPI's ``opal_progress_set_yield_when_idle``; 0 where it does not yield, and for other libraries.

    With more ranks than slots Open MPI gives the core away in every probe that finds nothing. The rank's own computing
    then takes it for a slice of the scheduler, 16 times in a turn: the probes leave that out.
    """
    switch = getattr(_mpi_library(), "opal_progress_set_yield_when_idle", None)
    if switch is None:
        return 0
    switch.argtypes, switch.restype = [ctypes.c_bool], ctypes.c_bool
    yields = switch(False)
    switch(yields)
    return _address(switch) if yields else 0


class Watcher:
    """Turns MPI's progress and waits for requests; ``turn`` is for one thread at a time.

    Args:
        comm: mpi4py communicator of its own, on which nobody ever sends.
        requests, done: int64, contiguous: a request is open where they differ.
        probes: calls of ``MPI_Iprobe`` per turn; 0 leaves progress to the library.
        sleep: microseconds between turns.
        gate: int64 (1,), not 0 while another thread of this process is in a one-sided operation: then the probes are left
            out, since that thread lets MPI go on, and they would only fight it for MPI's lock.
    """

    def __init__(
        self,
        comm: Any,
        requests: np.ndarray,
        done: np.ndarray,
        *,
        probes: int = PROBES,
        sleep: int = SLEEP,
        gate: np.ndarray | None = None,
    ) -> None:
        from mpi4py import MPI

        functions = (_address(_mpi_library().MPI_Iprobe), _address(ctypes.CDLL(None).usleep), _yield_switch())
        scratch = np.zeros(64, np.int64)  # the flag, and a status of any library
        self._stop = np.zeros(1, np.int64)
        self._fixed = (*functions, MPI._handleof(comm), MPI.ANY_SOURCE, MPI.ANY_TAG, scratch, probes, sleep)
        self._words = (requests.reshape(-1), done.reshape(-1))
        self._sleep = sleep
        self._gate = np.zeros(1, np.int64) if gate is None else gate

    def turn(self, first: int = 0, eager: int = 0, turns: int = -1) -> int:
        """The index of an open request, the search beginning at ``first``; -1 once stopped, -2 after ``turns`` turns."""
        short = min(SHORT_SLEEP, self._sleep)
        return int(watch(*self._fixed, short, eager, *self._words, first, turns, self._gate, self._stop))

    def stop(self) -> None:
        """Let ``turn`` return -1 from now on."""
        self._stop[0] = 1


class ProgressThread:
    """Runs a ``Watcher`` in a thread and hands every open request to ``serve``.

    It stops before MPI is finalised, however the process leaves.

    Args:
        watcher: what to run.
        serve: takes the index of an open request; whether it could be served now.
    """

    def __init__(self, watcher: Watcher, serve: Callable[[int], bool]) -> None:
        from mpi4py import MPI

        self._watcher = watcher
        self._serve = serve
        self._thread = threading.Thread(target=self._run, name="hpcasync-progress", daemon=True)
        # MPI_Finalize deletes the attributes of COMM_SELF first: after that nobody may call MPI.
        self._key = MPI.Comm.Create_keyval(delete_fn=lambda *_: self.stop())
        MPI.COMM_SELF.Set_attr(self._key, True)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the end. Idempotent."""
        self._watcher.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        serve_until(self._watcher, self._serve, lambda: False)


def serve_until(watcher: Watcher, serve: Callable[[int], bool], over: Callable[[], bool], turns: int = -1) -> None:
    """Serve every open request, others first where one can't be served now, until stopped or ``over`` after ``turns``."""
    at, eager, backoff = 0, 0, Backoff()
    while True:
        at = watcher.turn(at, eager, turns)
        if at == -2 and not over():
            at, eager = 0, 0
            continue
        if at < 0:
            return
        if serve(at):
            eager, backoff = EAGER_TURNS, Backoff()
        else:
            backoff.pause()
        at += 1
