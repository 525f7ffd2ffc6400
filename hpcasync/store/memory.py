"""The memory of the ports: shared inside a node, a window between nodes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from hpcasync.kernels.atomic import put, take
from hpcasync.store.placement import Port, Segment


class Memory:
    """Every port's segment: as an array for the ranks of its node, by put and get for all others.

    ``Allocate_shared`` on the node gives loads and stores; ``Create`` on the own segment over all nodes gives one-sided
    access to the very same memory. One ``Lock_all`` epoch lasts for the life of the windows. Constructor and ``free`` are
    collective over ``comm``. Only one thread may call the operations.

    Args:
        comm: all processes, on all nodes.
        node_comm: those of this node.
        ports: of all nodes.
        segments: of the ports, in the same order.
    """

    def __init__(self, comm: Any, node_comm: Any, ports: Sequence[Port], segments: Sequence[Segment]) -> None:
        from mpi4py import MPI

        self._ports = ports
        self.gate = np.zeros(1, np.int64)  # see Watcher
        mine = [s for p, s in zip(ports, segments, strict=True) if p.rank == comm.rank]
        size = mine[0].offsets["end"] if mine else 0
        self._shared = MPI.Win.Allocate_shared(size, 1, comm=node_comm)
        own = cast(Any, self._shared.Shared_query(node_comm.rank)[0])
        if mine:
            np.frombuffer(own, np.uint8)[: mine[0].offsets["state"]] = 0
        self._window = MPI.Win.Create(own if mine else None, 1, comm=comm)
        there = comm.group.Translate_ranks([p.rank for p in ports], node_comm.group)
        self.local: dict[int, np.ndarray] = {
            i: np.frombuffer(cast(Any, self._shared.Shared_query(rank)[0]), np.uint8)[: s.offsets["end"]]
            for i, (rank, s) in enumerate(zip(there, segments, strict=True))
            if rank != MPI.UNDEFINED
        }
        for window in (self._shared, self._window):
            window.Lock_all(MPI.MODE_NOCHECK)
        self._types = {np.dtype(np.float32): MPI.FLOAT, np.dtype(np.float64): MPI.DOUBLE, np.dtype(np.int64): MPI.INT64_T}
        self._types[np.dtype(np.uint8)] = MPI.BYTE
        self.sync()
        self._meet_ports()
        comm.Barrier()  # nobody computes before all have met

    def _meet_ports(self) -> None:
        """Get a byte from every port of another node, while all processes are in MPI.

        At the first operation on a target Open MPI (osc/rdma) asks the first process of a node where the target's memory lies:
        one that may hold no port, and so may never let MPI go on while it computes or waits.
        """
        for port in set(range(len(self._ports))) - set(self.local):
            self.get(port, 0, np.zeros(1, np.uint8))
            self.flush(port)

    def sync(self) -> None:
        """See what others of this node have written, and let them see this rank's."""
        self._shared.Sync()
        self._window.Sync()

    def put(self, port: int, offset: int, values: np.ndarray) -> None:
        """Begin to write ``values`` at a byte of a port on another node."""
        kind = self._types[values.dtype]
        with self._in_mpi():
            self._window.Put((values, kind), self._ports[port].rank, (offset, values.size, kind))

    def get(self, port: int, offset: int, values: np.ndarray) -> None:
        """Begin to read into ``values``."""
        kind = self._types[values.dtype]
        with self._in_mpi():
            self._window.Get((values, kind), self._ports[port].rank, (offset, values.size, kind))

    def flush(self, port: int) -> None:
        """Wait until everything begun on the port is done."""
        with self._in_mpi():
            self._window.Flush(self._ports[port].rank)

    @contextmanager
    def _in_mpi(self) -> Iterator[None]:
        """Keep the progress thread's probes out: this thread lets MPI go on meanwhile."""
        while not take(self.gate, 0, 1):
            time.sleep(0)
        try:
            yield
        finally:
            put(self.gate, 0, 0)

    def free(self) -> None:
        """Give the windows back. Collective."""
        self.local = {}
        for window in (self._window, self._shared):
            window.Unlock_all()
            window.Free()
