"""The fused pass and the finite check on several threads: those that torch's own operators run on.

After an operator, torch's OpenMP threads spin for some milliseconds in wait of the next. Threads of our own would fight
them for the cores just when a step begins; so the work goes to the same team, through the runtime's ``GOMP_parallel``
(GNU, Intel and LLVM runtimes have it). Where there is none, one thread does all. The threads claim chunks as they come
free, so a core that is busy elsewhere holds nobody up; the bits do not depend on who does what.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from hpcasync.kernels.elementwise import all_finite
from hpcasync.kernels.fused import fused_update

CHUNK = 1 << 15
"""Elements that a thread claims at a time."""

_WORDS = 20  # int64 words of a job: the next free element, then what the part function needs


@intrinsic
def _claim(typing_context: Any, address: Any, count: Any) -> Any:
    """Add ``count`` to the int64 at ``address`` atomically; returns what was there."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, args[1], "monotonic")

    return types.int64(types.int64, types.int64), build


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@cfunc(types.void(types.voidptr), cache=True)
def _update_part(data):
    job = carray(data, (_WORDS,), np.int64)
    size, start = job[1], job[2]
    state = carray(_pointer(job[3]), (job[4], job[5]), np.float32)
    grad = carray(_pointer(job[6]), (size,), np.float32)
    out = carray(_pointer(job[7]), (size,), np.float32)
    private = carray(_pointer(job[8]), (job[9], job[10]), np.float32)
    plan = carray(_pointer(job[11]), (job[12],), np.int64)
    hyper = carray(_pointer(job[13]), (job[14],), np.float64)
    while True:
        lo = _claim(job.ctypes.data, CHUNK)
        if lo >= size:
            return
        hi = min(lo + CHUNK, size)
        fused_update(
            state, start + lo, grad[lo:hi], out[lo:hi], private, plan, hyper, job[15], job[16], job[17],
        )  # fmt: skip


@cfunc(types.void(types.voidptr), cache=True)
def _finite_part(data):
    job = carray(data, (_WORDS,), np.int64)
    size = job[1]
    values = carray(_pointer(job[2]), (size,), np.float32)
    while True:
        lo = _claim(job.ctypes.data, CHUNK)
        if lo >= size:
            return
        if not all_finite(values[lo : min(lo + CHUNK, size)]):
            job[3] = 0


def update(
    threads: int,
    state: np.ndarray,
    start: int,
    grad: np.ndarray,
    out: np.ndarray,
    private: np.ndarray,
    plan: np.ndarray,
    hyper: np.ndarray,
    count: int,
    tau: int,
    arrival: int,
) -> None:
    """``fused_update`` on ``threads`` threads."""
    run = _runner() if threads > 1 and grad.size > CHUNK else None
    if run is None:
        fused_update(state, start, grad, out, private, plan, hyper, count, tau, arrival)
        return
    # fmt: off
    job = np.array([
        0, grad.size, start, state.ctypes.data, state.shape[0], state.shape[1], grad.ctypes.data, out.ctypes.data,
        private.ctypes.data, private.shape[0], private.shape[1], plan.ctypes.data, plan.size,
        hyper.ctypes.data, hyper.size, count, tau, arrival, 0, 0,
    ], np.int64)
    # fmt: on
    run(_update_part.address, job, threads)


def finite(threads: int, values: np.ndarray) -> bool:
    """``all_finite`` on ``threads`` threads."""
    run = _runner() if threads > 1 and values.size > CHUNK else None
    if run is None:
        return bool(all_finite(values))
    job = np.zeros(_WORDS, np.int64)
    job[1:4] = values.size, values.ctypes.data, 1
    run(_finite_part.address, job, threads)
    return bool(job[3])


@cache
def _runner() -> Callable[[int, np.ndarray, int], None] | None:
    """What runs a part function on torch's team; None where torch has no OpenMP runtime that offers it."""
    import torch

    try:
        # A symbol is looked for in the library and in what it is linked with: this is the runtime that torch uses.
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def run(part: int, job: np.ndarray, threads: int) -> None:
        parallel(part, job.ctypes.data, threads, 0)

    return run
