"""What a host rank does for a store: it holds the memory of its shards, lets MPI go on, and serves what arrives."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import numpy as np

from hpcasync.comm.host_ranks import HostRanks
from hpcasync.comm.progress import Watcher, serve_until
from hpcasync.errors import UsageError
from hpcasync.rules import Rule
from hpcasync.store.layout import Layout
from hpcasync.store.memory import Memory
from hpcasync.store.part import Part
from hpcasync.store.placement import Port, Segment

SLEEP = 50
"""Microseconds between two looks: a host rank has its core for itself."""

TURNS = 100
"""Looks between two questions whether the workers call."""


def start_hosts(
    hosts: HostRanks, layout: Layout, rule: Rule, workers: int, ports: Sequence[Port], segments: Sequence[Segment]
) -> None:
    """Have the host ranks make their side of a store's memory, and serve it. Collective over the workers.

    Raises:
        UsageError: they serve another store.
    """
    if hosts.busy:
        raise UsageError("a second Async while the host ranks serve another: close() the first one before")
    hosts.busy = True
    hosts.run(functools.partial(_serve, layout=layout, rule=rule, workers=workers, ports=ports, segments=segments))


def end_hosts(hosts: HostRanks) -> None:
    """Have the host ranks leave the store; they then free its memory together with the workers."""
    hosts.busy = False
    hosts.run(_end)


def _end(hosts: HostRanks) -> None:
    """The job that tells a host rank that the store is over."""


def _serve(
    hosts: HostRanks, *, layout: Layout, rule: Rule, workers: int, ports: Sequence[Port], segments: Sequence[Segment]
) -> None:
    memory = Memory(hosts.comm, hosts.node_comm, ports, segments)
    comm = hosts.comm.Dup()
    mine = [i for i, p in enumerate(ports) if p.rank == hosts.comm.rank]
    none = np.zeros(workers, np.int64)
    if mine:
        rule.warm_up()
        part = Part(
            layout,
            ports[mine[0]],
            segments[mine[0]],
            memory.local[mine[0]],
            rule,
            workers=workers,
            clocks=none,
            excused=none,
            owner=hosts.comm.size + hosts.comm.rank + 1,
            threads=1,
        )
        watcher = Watcher(comm, part.requests, part.done, sleep=SLEEP)
        serve_until(watcher, part.serve, hosts.called, TURNS)
        del part, watcher
    if hosts.next_job() is None:  # the workers leave without closing the store
        sys.exit(0)
    memory.free()
    comm.Free()
