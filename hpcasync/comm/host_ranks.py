"""Ranks that only serve: set aside on every node, they never train, so MPI always goes on there."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from hpcasync.comm import failure
from hpcasync.errors import UsageError

Job = Callable[["HostRanks"], None]

POLL_SECONDS = 0.002
"""Between two looks of a host rank whether the workers call it."""


def host_ranks_problem(count: int, sizes: list[int]) -> str | None:
    """Why nodes with ``sizes`` ranks can't set ``count`` of them aside each; None: they can."""
    if len(sizes) == 1:
        return f"host_ranks={count} on one node: nothing crosses the network there; leave it out"
    if min(sizes) <= count:
        return f"host_ranks={count}, but the nodes have {sizes} ranks: every node needs at least one more, to train"
    return None


class HostRanks:
    """All processes of the job, workers and host ranks; the last ``count`` ranks of each node are its host ranks.

    The workers' ``World`` leaves the host ranks out. A host rank waits for jobs, which the workers give by ``run``: first one
    that makes a store, then one that ends it. When the workers finalise MPI the host ranks end too.

    Args:
        comm: of all processes.
        node_comm: of those of this node.
        count: host ranks per node.

    Attributes:
        ports: (rank in ``comm``, node) of every host rank.
        is_host: whether this process is one.

    Raises:
        UsageError: one node only, or a node without a worker.
    """

    def __init__(self, comm: Any, node_comm: Any, count: int) -> None:
        everyone = comm.allgather((node_comm.allgather(comm.rank)[0], node_comm.rank, node_comm.size))
        nodes = sorted({first for first, _, _ in everyone})
        problem = host_ranks_problem(count, [next(size for f, _, size in everyone if f == first) for first in nodes])
        if problem is not None:
            raise UsageError(problem)
        self.comm, self.node_comm, self.count = comm, node_comm, count
        self.ports = [(rank, nodes.index(first)) for rank, (first, local, size) in enumerate(everyone) if local >= size - count]
        self.is_host = comm.rank in [rank for rank, _ in self.ports]
        self._root = next(rank for rank in range(comm.size) if rank not in [r for r, _ in self.ports])
        self._call: Any = None
        self._ended = False
        self.busy = False  # serving a store

    def split(self) -> Any:
        """The communicator of this process's kind, workers or host ranks, in the order of the ranks."""
        return self.comm.Split(int(self.is_host), self.comm.rank)

    def run(self, job: Job | None) -> None:
        """Have every host rank do ``job``, a picklable function; None ends them. Collective over the workers."""
        if self._ended:
            return
        self._ended = job is None
        self.comm.Ibarrier().Wait()
        self.comm.bcast(job, self._root)

    def end_with_workers(self) -> None:
        """End the host ranks with the workers, in whatever way those leave."""
        from mpi4py import MPI

        atexit.register(self._end)
        # A script that finalises MPI itself: that deletes the attributes of COMM_SELF first, while MPI still works.
        key = MPI.Comm.Create_keyval(delete_fn=lambda *_: self.run(None))
        MPI.COMM_SELF.Set_attr(key, True)

    def _end(self) -> None:
        failure.meet_or_abort()
        self.run(None)

    def called(self) -> bool:
        """Whether the workers have a job (a host rank asks)."""
        if self._call is None:
            self._call = self.comm.Ibarrier()
        return bool(self._call.Test())

    def next_job(self) -> Job | None:
        """Wait for the next job."""
        while not self.called():
            time.sleep(POLL_SECONDS)
        self._call = None
        job: Job | None = self.comm.bcast(None, self._root)
        return job

    def serve(self) -> NoReturn:
        """What a host rank does until the workers are done; then its process ends."""
        while (job := self.next_job()) is not None:
            job(self)
        sys.exit(0)
