"""What the backends ask of GPUs: whether ranks share one, and page-locked memory that torch has not allocated."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from hpcasync.comm.world import World
from hpcasync.errors import UsageError


def own_gpus(world: World) -> bool:
    """Whether every rank has a GPU that no other rank has: nccl refuses to share one. Collective."""
    mine = None
    if world.device.type == "cuda":
        mine = (world.node, str(torch.cuda.get_device_properties(world.device).uuid))
    everyone = world.gather(mine)
    return None not in everyone and len(set(everyone)) == world.size


def page_lock(memory: np.ndarray) -> None:
    """Page-lock ``memory`` for copies that don't hold the host, until the last array in it is gone.

    Raises:
        UsageError: CUDA refuses.
    """
    cudart: Any = torch.cuda.cudart()
    start = memory.ctypes.data
    code = int(cudart.cudaHostRegister(start, memory.nbytes, 1))  # 1: page-locked for all devices of the process
    if code:
        raise UsageError(
            f"CUDA can't page-lock {memory.nbytes / 2**20:.0f} MiB of shared memory (cudaError {code}); raise the limit on "
            "locked memory (ulimit -l), or use --collectives mpi"
        )
    # All views hold the array at the bottom, which goes before the memory is unmapped.
    bottom = memory if memory.base is None or not isinstance(memory.base, np.ndarray) else memory.base
    weakref.finalize(bottom, cudart.cudaHostUnregister, start).atexit = False
