"""Who am I: rank, node and device of this process, found once by ``init()``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hpcasync.comm import failure, launch
from hpcasync.comm.collectives import Collectives, MPICollectives, OneRank
from hpcasync.comm.host_ranks import HostRanks
from hpcasync.comm.signs import GATHER, MESSAGE
from hpcasync.errors import UsageError

if TYPE_CHECKING:  # which holds a World
    from hpcasync.comm.stall import Watch


@dataclass(frozen=True)
class World:
    """This process's place in the job.

    Attributes:
        rank: this process, 0 .. size-1.
        size: number of ranks.
        local_rank: this process among those of its node.
        local_size: ranks on this node.
        node: index of this node, 0 .. nodes-1, in the order of the nodes' lowest ranks.
        nodes: number of nodes.
        device: where this rank's model belongs.
        threads: CPU threads that this rank may use.
        library: version line of the MPI library, empty without MPI.
        comm: mpi4py communicator of all ranks, private to hpcasync; ``None`` without MPI.
        node_comm: communicator of this node's ranks.
        leaders: communicator of the ranks with ``local_rank == 0``; ``None`` on the others.
        collectives: broadcast, allreduce, barrier over all ranks.
        hosts: the ranks set aside to serve the stores, which are not counted above; ``None`` without.
        watch: over ranks that hang (``hpcasync.comm.stall``); ``None`` without.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    library: str = ""
    comm: Any = None
    node_comm: Any = None
    leaders: Any = None
    collectives: Collectives = field(default_factory=OneRank)
    hosts: HostRanks | None = None
    watch: Watch | None = None

    def gather(self, value: Any) -> list[Any]:
        """The pickled ``value`` of every rank, in rank order, on every rank. Collective."""
        return [value] if self.comm is None else list(self.within(self.comm.allgather, value, kind=GATHER))

    def within(self, work: Callable[..., Any], *args: Any, kind: int = MESSAGE) -> Any:
        """``work(*args)``, in which this rank may have to wait for others: told to the watch."""
        return work(*args) if self.watch is None else self.watch.signs.within(kind, work, *args)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside, what this rank does is called so by the watch: one of ``hpcasync.comm.signs.PHASES``."""
        return nullcontext() if self.watch is None else self.watch.signs.phase(name)


_world: World | None = None
_lock = threading.Lock()


def init(
    *, device: str | torch.device = "auto", threads: int | None = None, mpi: bool = True, host_ranks: int = 0
) -> World:
    """Initialise MPI if there is one and return this process's ``World``; later calls return the same ranks.

    Not started under MPI is fine and means one rank. Uncaught exceptions end the whole job from here on.

    Args:
        device: ``"auto"`` takes the GPU with the number of the local rank where there is one (modulo the visible
            GPUs, since schedulers often show each task only its own), else the CPU.
        threads: CPU threads for torch; by default the cores that the node's ranks may use, shared evenly, unless
            ``OMP_NUM_THREADS`` is set.
        mpi: ``False`` never touches MPI.
        host_ranks: on each of several nodes set so many ranks aside, which serve the stores of ``Async`` and never train:
            for them this call does not return, their process ends with the others'.

    Raises:
        UsageError: the launcher started several tasks but MPI sees one; MPI without ``MPI_THREAD_MULTIPLE``; host ranks on
            one node, on a node without other ranks, or asked for too late.
    """
    global _world
    with _lock:
        if _world is None:
            _world = _make_world(device, threads, mpi, host_ranks)
        elif host_ranks and (_world.hosts is None or _world.hosts.count != host_ranks):
            raise UsageError(f"host_ranks={host_ranks}: the first call of init() decides; give it there")
        else:  # MPI is initialised once; a later choice of device or threads still counts
            if str(device) != "auto":
                _world = replace(_world, device=_pick_device(device, _world.local_rank))
            if threads is not None:
                _world = replace(_world, threads=_set_threads(threads, 1, 1))
        return _world


def _make_world(device: str | torch.device, threads: int | None, mpi: bool, host_ranks: int) -> World:
    MPI = _load_mpi() if mpi else None
    if MPI is None:
        launch.check_world(1, "")
        if host_ranks:
            raise UsageError(f"host_ranks={host_ranks} without MPI: there is one rank only; leave it out")
        count = _set_threads(threads, len(_cores()), 1)
        return World(device=_pick_device(device, 0), threads=count)
    library = MPI.Get_library_version().split("\n")[0].rstrip("\x00 ").strip()
    launch.check_world(MPI.COMM_WORLD.size, library)
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise UsageError(
            f"MPI was initialised with thread level {MPI.Query_thread()}, expected MPI_THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}): leave mpi4py.rc.thread_level at 'multiple', or use an MPI built with it. "
            f"MPI here: {library}."
        )
    comm = MPI.COMM_WORLD.Dup()
    if comm.size > 1:
        failure.install(comm)
    hosts = None
    if host_ranks:
        hosts = HostRanks(comm, comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank), host_ranks)
        comm = hosts.split()
        failure.install(comm)  # the workers speak for themselves
        if hosts.is_host:
            hosts.serve()
        hosts.end_with_workers()
    node_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    leaders = comm.Split(0 if node_comm.rank == 0 else MPI.UNDEFINED, comm.rank)
    is_leader = leaders != MPI.COMM_NULL
    node, nodes = node_comm.bcast((leaders.rank, leaders.size) if is_leader else None)
    cores = len(set().union(*node_comm.allgather(_cores())))
    count = _set_threads(threads, cores, node_comm.size)
    return World(
        rank=comm.rank,
        size=comm.size,
        local_rank=node_comm.rank,
        local_size=node_comm.size,
        node=node,
        nodes=nodes,
        device=_pick_device(device, node_comm.rank),
        threads=count,
        library=library,
        comm=comm,
        node_comm=node_comm,
        leaders=leaders if is_leader else None,
        collectives=MPICollectives(comm, polite=node_comm.size > cores) if comm.size > 1 else OneRank(),
        hosts=hosts,
    )


def _load_mpi() -> Any:
    """The ``mpi4py.MPI`` module, initialised; ``None`` where mpi4py or an MPI library is missing."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        tasks, launcher = launch.launched_tasks()
        if tasks > 1:
            raise UsageError(
                f"{launcher} started {tasks} tasks, but MPI can't be loaded in {sys.prefix}: {error}. "
                "Install one: pip install 'hpcasync[mpich]'."
            ) from error
        return None
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _set_threads(threads: int | None, cores: int, ranks: int) -> int:
    """Share the node's cores among its ranks; an explicit choice, argument or OMP_NUM_THREADS, wins."""
    if threads is None and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        threads = int(os.environ["OMP_NUM_THREADS"])
    count = max(1, cores // ranks) if threads is None else threads
    if count < 1:
        raise UsageError(f"threads={threads}: expected at least 1")
    torch.set_num_threads(count)
    return count


def _pick_device(device: str | torch.device, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if str(device) == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device={device!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if chosen.type == "cuda":
        if not gpus:
            raise UsageError(f"device={device!r}, but torch {torch.__version__} sees no GPU here; use 'cpu' or 'auto'")
        index = local_rank % gpus if chosen.index is None else chosen.index
        if index >= gpus:
            raise UsageError(f"device={device!r}: this process sees {gpus} GPUs")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    return chosen
