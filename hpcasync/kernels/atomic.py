"""Atomic operations on int64 words in shared memory, and calls of C functions by address, without the GIL's help."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def _exchange(typing_context: Any, address: Any, expected: Any, new: Any) -> Any:
    """Compare-and-swap of the int64 at ``address``; returns what was there."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.extract_value(builder.cmpxchg(word, args[1], args[2], "seq_cst", "seq_cst"), 0)

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic
def _fetch_add(typing_context: Any, address: Any, count: Any) -> Any:
    """Add to the int64 at ``address``; returns what was there. A full memory barrier."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@intrinsic
def load_word(typing_context: Any, address: Any) -> Any:
    """The int64 at ``address``, with all that was written before it was stored."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def _store(typing_context: Any, address: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def call_iprobe(typing_context: Any, function: Any, source: Any, tag: Any, comm: Any, flag: Any, status: Any) -> Any:
    """``int f(int, int, MPI_Comm, int *, MPI_Status *)``; a communicator is passed in a register, pointer or int."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        kind = ir.FunctionType(i32, [i32, i32, i64, i64, i64])
        target = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(target, [builder.trunc(args[1], i32), builder.trunc(args[2], i32), *args[3:]])

    return types.int32(*[types.int64] * 6), build


@intrinsic
def call_with_int(typing_context: Any, function: Any, argument: Any) -> Any:
    """``int f(int)``, or of types that are passed alike."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        target = builder.inttoptr(args[0], ir.FunctionType(i32, [i32]).as_pointer())
        return builder.call(target, [builder.trunc(args[1], i32)])

    return types.int32(types.int64, types.int64), build


@njit(cache=True)
def take(words: np.ndarray, index: int, owner: int) -> bool:
    """Take the lock ``words[index]`` (int64, contiguous, 0: free) for ``owner`` if it is free."""
    return _exchange(words.ctypes.data + 8 * index, 0, owner) == 0


@njit(cache=True)
def exchange(words: np.ndarray, index: int, expected: int, new: int) -> bool:
    """Store ``new`` if the word is ``expected``; whether it was."""
    return _exchange(words.ctypes.data + 8 * index, expected, new) == expected


@njit(cache=True)
def put(words: np.ndarray, index: int, value: int) -> None:
    """Store a word after everything that was written before."""
    _store(words.ctypes.data + 8 * index, value)


@njit(cache=True)
def get(words: np.ndarray, index: int) -> int:
    """Load a word before everything that is read after."""
    return load_word(words.ctypes.data + 8 * index)


@njit(cache=True)
def count_up(words: np.ndarray, index: int) -> int:
    """Add 1 to a word, a full memory barrier; returns what was there."""
    return _fetch_add(words.ctypes.data + 8 * index, 1)
