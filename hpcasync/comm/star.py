"""A communicator of one node's ranks that outlives ranks: messages over Unix sockets through rank 0, which knows who has died.

MPI's collectives hang when a member dies in one. Here rank 0 takes part in every operation and alone decides how it ended, so
that all living ranks come to the same: either each has the result, or each gets `RankDied` and calls `shrink`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_HEAD = struct.Struct("<qq?")  # generation, bytes, whether they are a pickle
_POLL = 100
"""Milliseconds between two looks at who has died, and at what is to be done while waiting."""


class RankDied(Exception):
    """Members died; all living ones get this in the same operation, and go on after `Star.shrink`."""

    def __init__(self, dead: Sequence[int]) -> None:
        super().__init__(f"rank {', '.join(map(str, dead))} died")
        self.dead = tuple(dead)


class Star:
    """The ranks of an mpi4py communicator, on one node. Constructor collective.

    The methods are those of mpi4py that training uses, over the living, numbered in their old order.

    Args:
        comm: all ranks, alive, on one node.
        died: called on rank 0, perhaps in a thread, with a rank that has just died (its number in ``comm``) and the time.

    Attributes:
        members: numbers in ``comm`` of those that take part.
        deaths: on rank 0, when each dead rank died (``time.time``).
    """

    def __init__(self, comm: Any, died: Callable[[int, float], None] | None = None) -> None:
        self._me = comm.rank
        self.members = list(range(comm.size))
        self.deaths: dict[int, float] = {}
        self._generation = 0
        self._died = died
        self._burying = threading.Lock()
        self._links: dict[int, socket.socket] = {}
        # In a folder that only this user enters, with a name that a socket may have.
        folder = tempfile.mkdtemp(prefix="hpcasync-", dir=_short_folder()) if self._me == 0 else None
        folder = comm.bcast(folder)
        address = f"{folder}/star"
        if self._me == 0:
            server = socket.socket(socket.AF_UNIX)
            server.bind(address)
            server.listen(comm.size)
            comm.Barrier()
            for _ in range(1, comm.size):
                link, _ = server.accept()
                self._links[struct.unpack("<q", link.recv(8, socket.MSG_WAITALL))[0]] = link
            server.close()
            os.unlink(address)
            os.rmdir(folder)
        else:
            comm.Barrier()
            link = socket.socket(socket.AF_UNIX)
            link.connect(address)
            link.sendall(struct.pack("<q", self._me))
            self._links[0] = link
        pids = comm.allgather(os.getpid())
        if self._me == 0 and comm.size > 1:
            # A process id may be used again, its descriptor not; and a forked child keeps a socket open, but no process.
            watched = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids) if rank}
            threading.Thread(target=self._watch, args=(watched,), name="deaths", daemon=True).start()

    @property
    def rank(self) -> int:
        """This rank among the living."""
        return self.members.index(self._me)

    @property
    def size(self) -> int:
        """Living members."""
        return len(self.members)

    def allgather(self, value: Any, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """``meanwhile``: called several times a second, for members that come late."""
        return list(self._meet(value, lambda values: [values] * len(values), meanwhile=meanwhile))

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        return self._meet(value, lambda values: [values if r == root else None for r in range(len(values))])

    def scatter(self, values: Sequence[Any] | None, root: int = 0) -> Any:
        return self._meet(values if self.rank == root else None, lambda found: found[root])

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self._meet(value if self.rank == root else None, lambda found: [found[root]] * len(found))

    def Barrier(self) -> None:
        self._meet(None, lambda found: found)

    def Send(self, values: np.ndarray, dest: int = 0) -> None:
        """Send an array to rank 0."""
        assert dest == 0 and self._me
        self._send(0, values.reshape(-1).view(np.uint8).data, pickled=False)

    def Recv(self, values: np.ndarray, source: int) -> None:
        """Receive what a rank has sent to rank 0.

        Raises:
            RankDied: to this rank only: the next operation tells the others.
        """
        rank = self.members[source]
        try:
            data = self._receive(rank, pickled=False)
        except OSError:
            self._lost(rank)
            raise RankDied([rank]) from None
        values.reshape(-1).view(np.uint8)[:] = data

    def sum(self, values: np.ndarray) -> None:
        """Replace an array by its sum over the members, added in their order."""
        values[...] = self._meet(values, lambda found: [np.sum(found, axis=0, dtype=values.dtype)] * len(found))

    def shrink(self) -> list[int]:
        """Go on without the dead, after `RankDied`; returns who has died since the last time. Collective over the living."""
        before = self.members
        while True:
            self._generation += 1
            try:
                self.members = self._meet(None, lambda found: [list(self.members)] * len(found), shrinking=True)
                return [r for r in before if r not in self.members]
            except RankDied:
                continue

    def outlast(self) -> None:
        """Wait for rank 0's end, on the others."""
        if self._me:
            with contextlib.suppress(OSError):
                while self._links[0].recv(1):
                    pass

    # Both halves of an operation.

    def _meet(
        self,
        value: Any,
        answer: Callable[[list[Any]], list[Any]],
        *,
        shrinking: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> Any:
        if self._me:
            self._send(0, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
            fine, result = self._receive(0, meanwhile)
            if not fine:
                raise RankDied(result)
            return result
        if shrinking:
            self.members = [r for r in self.members if r not in self.deaths]
        found = {0: value}
        for rank in self.members[1:]:
            try:
                found[rank] = self._receive(rank, meanwhile)
            except OSError:
                self._lost(rank)
        dead = [r for r in self.members if r in self.deaths]
        answers = answer([found[r] for r in self.members]) if not dead else [tuple(dead)] * len(self.members)
        for rank, own in list(zip(self.members, answers, strict=True))[1:]:
            try:
                if rank not in self.deaths:
                    self._send(rank, pickle.dumps((not dead, own), pickle.HIGHEST_PROTOCOL))
            except OSError:  # it is found missing in the next operation
                self._lost(rank)
        if dead:
            raise RankDied(dead)
        return answers[0]

    def _await(self, rank: int, meanwhile: Callable[[], None] | None) -> None:
        """Return when something has come from a rank, or its end."""
        poll = select.poll()
        poll.register(self._links[rank], select.POLLIN)
        while not poll.poll(_POLL):
            if rank in self.deaths:
                raise ConnectionResetError
            if meanwhile is not None:
                meanwhile()

    def _send(self, rank: int, data: bytes | memoryview, pickled: bool = True) -> None:
        link = self._links[rank]
        link.sendall(_HEAD.pack(self._generation, len(data), pickled))
        link.sendall(data)

    def _receive(self, rank: int, meanwhile: Callable[[], None] | None = None, pickled: bool = True) -> Any:
        """The next message of this kind and generation; others were of an operation that somebody's death ended."""
        while True:
            generation, size, is_pickle = _HEAD.unpack(self._exactly(rank, _HEAD.size, meanwhile))
            data = self._exactly(rank, size, meanwhile)
            if generation >= self._generation and is_pickle == pickled:
                # Of our own ranks, over a socket that only they have.
                return pickle.loads(data) if pickled else data

    def _exactly(self, rank: int, size: int, meanwhile: Callable[[], None] | None) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            self._await(rank, meanwhile)  # a forked child of a dead rank may hold its socket open
            count = self._links[rank].recv_into(view)
            if not count:
                raise ConnectionResetError("the other end has died")
            view = view[count:]
        return data

    # Deaths.

    def _watch(self, watched: dict[int, int]) -> None:
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)
        while watched:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                os.close(descriptor)
                self._lost(watched.pop(descriptor))

    def _lost(self, rank: int) -> None:
        with self._burying:
            if rank not in self.deaths:
                now = time.time()
                if self._died is not None:
                    self._died(rank, now)
                self.deaths[rank] = now


def _short_folder() -> str:
    """The folder for temporary files, or another one: the name of a Unix socket has room for 107 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) < 80 else next(f for f in ("/dev/shm", "/tmp") if os.access(f, os.W_OK))
