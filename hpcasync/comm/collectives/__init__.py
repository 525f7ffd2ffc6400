"""Sums over the ranks, behind one protocol: mpi4py, the node's shared memory, torch.distributed, Horovod."""

from hpcasync.comm.collectives.base import Buffer, Collectives, OneRank, Pending
from hpcasync.comm.collectives.mpi import MPICollectives

__all__ = ["Buffer", "Collectives", "MPICollectives", "OneRank", "Pending"]
