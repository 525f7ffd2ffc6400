"""The loop of the progress thread: it lets MPI go on and watches words, without the GIL."""

from __future__ import annotations

from numba import njit

from hpcasync.kernels.atomic import call_iprobe, call_with_int, load_word, put, take


@njit(nogil=True, cache=True)
def watch(
    iprobe, usleep, yields, comm, source, tag, scratch, probes, sleep, short, eager, requests, done, first, turns, gate, stop
):
    """Turn until a word of ``requests`` differs from that of ``done``: its index, looking from ``first`` on.

    ``yields``, unless 0, is a function that tells MPI whether to give the core away when it finds nothing to do. Returns -1
    once stopped, -2 after ``turns`` turns.
    """
    count = requests.size
    flag, status = scratch.ctypes.data, scratch.ctypes.data + 64
    while load_word(stop.ctypes.data) == 0:
        if turns == 0:
            return -2
        turns -= 1
        if probes > 0 and take(gate, 0, 1):  # else the main thread is in MPI, which goes on by that
            if yields != 0:
                call_with_int(yields, 0)
            for _ in range(probes):
                call_iprobe(iprobe, source, tag, comm, flag, status)
            if yields != 0:
                call_with_int(yields, 1)
            put(gate, 0, 0)
        for i in range(count):
            at = 8 * ((first + i) % count)
            if load_word(requests.ctypes.data + at) != load_word(done.ctypes.data + at):
                return (first + i) % count
        call_with_int(usleep, short if eager > 0 else sleep)
        eager -= 1
    return -1
