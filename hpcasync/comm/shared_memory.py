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

SKEW = 5 * 64
"""Bytes between the rows' ends and a page: rows at equal places in a page would evict each other from the cache."""


def shared_rows(world: World, nbytes: int) -> np.ndarray:
    """Zeros of shape (ranks of the node, at least ``nbytes``), uint8; row r belongs to local rank r. Collective over all ranks.

    Raises:
        UsageError: on every rank, if a node's shared memory is too small.
    """
    page = mmap.PAGESIZE
    stride = -(-max(nbytes, 1) // page) * page + SKEW
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    name = world.node_comm.bcast(f"hpcasync-{uuid.uuid4().hex}")
    size = stride * world.local_size
    descriptor, problem = -1, None
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(descriptor, size)
        # Each rank its own row: the pages come from its own memory, and a full disk is an error here, not a SIGBUS later.
        os.posix_fallocate(descriptor, stride * world.local_rank, stride)
    except OSError as error:
        problem = (
            f"{folder}: {error.strerror}; the shared window of {world.local_size} ranks needs {size / 2**20:.0f} MiB. Enlarge it "
            "(mount -o remount,size=..., docker run --shm-size=...), remove stale files in it, or use --collectives mpi."
        )
    world.node_comm.Barrier()  # all have opened it
    if world.local_rank == 0:
        (folder / name).unlink(missing_ok=True)
    try:
        raise_together(world, problem)
        view = mmap.mmap(descriptor, size)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return np.frombuffer(view, np.uint8).reshape(world.local_size, stride)
