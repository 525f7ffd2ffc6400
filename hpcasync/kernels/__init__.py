"""numba loops over flat float32 arrays: no torch, no MPI, no GIL."""

from hpcasync.kernels.codes import BASES, GRADIENTS, HYPER, PLAN, VARIANTS
from hpcasync.kernels.elementwise import all_finite, block_update, scale
from hpcasync.kernels.fused import fused_update

__all__ = ["BASES", "GRADIENTS", "HYPER", "PLAN", "VARIANTS", "all_finite", "block_update", "fused_update", "scale"]
