"""numba loops over flat float32 arrays: no torch, no MPI, no GIL."""

from hpcasync.kernels.elementwise import all_finite, block_update, scale
from hpcasync.kernels.fused import BASES, HYPER, VARIANTS, fused_update

__all__ = ["BASES", "HYPER", "VARIANTS", "all_finite", "block_update", "fused_update", "scale"]
