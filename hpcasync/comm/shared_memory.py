"""Memory that the ranks of a node share, and that lives as long as anybody looks at it.

Not ``MPI.Win.Allocate_shared``: freeing an MPI window is collective and unmaps it at once, while tensors of the user (a
model's parameters, a kept ``state_dict()``) may still lie in it. Here each process unmaps its view when its last array is
gone, and the file has no name any more, so that nothing stays behind, whoever is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import uuid
from pathlib import Path

import numpy as np

from hpcasync.comm.agree import raise_together
from hpcasync.comm.world import World
from hpcasync.errors import UsageError

SKEW = 5 * 64
"""Bytes between the rows' ends and a page: rows at equal places in a page would evict each other from the cache."""


def shared_rows(world: World, nbytes: int) -> np.ndarray:
    """Zeros of shape (ranks of the node, at least ``nbytes``), uint8; row r belongs to local rank r. Collective over all ranks.

    Raises:
        UsageError: on every rank, if a node's shared memory is too small.
    """
    page = mmap.PAGESIZE
    stride = -(-max(nbytes, 1) // page) * page + SKEW
    size = stride * world.local_size
    # Each rank its own row: the pages come from its own memory, and a full disk is an error here, not a SIGBUS later.
    descriptor = shared_file(world, size, (stride * world.local_rank, stride), ", or use --collectives mpi")
    try:
        view = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    return np.frombuffer(view, np.uint8).reshape(world.local_size, stride)


def shared_file(world: World, nbytes: int, mine: tuple[int, int], remedy: str = "") -> int:
    """A file of zeros in the node's memory, without a name, open on each of its ranks. Collective over all ranks.

    Args:
        world: the ranks.
        nbytes: its size.
        mine: start and length of what this rank takes memory for now.
        remedy: what else to do where there is too little memory.

    Returns:
        The descriptor.

    Raises:
        UsageError: on every rank, if a node's shared memory is too small.
    """
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    name, node = f"hpcasync-{uuid.uuid4().hex}", world.node_comm
    if node is not None:
        name = node.bcast(name)
    descriptor, problem = -1, None
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(descriptor, nbytes)
        os.posix_fallocate(descriptor, *mine)
    except OSError as error:
        problem = (
            f"{folder}: {error.strerror}; the shared window of {world.local_size} ranks needs {nbytes / 2**20:.0f} MiB. Enlarge "
            f"it (mount -o remount,size=..., docker run --shm-size=...), remove stale files in it{remedy}."
        )
    if node is not None:
        node.Barrier()  # all have opened it
    if world.local_rank == 0:
        (folder / name).unlink(missing_ok=True)
    try:
        raise_together(world, problem)
    except UsageError:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor
