"""Ranks, nodes, devices, collectives and launch checks."""

from hpcasync.comm.agree import agree, raise_together, together
from hpcasync.comm.backends import BACKENDS, check_backend, make_collectives
from hpcasync.comm.collectives import Collectives, MPICollectives, OneRank, Pending
from hpcasync.comm.launch import check_world, launched_rank, launched_tasks
from hpcasync.comm.world import World, init

__all__ = [
    "BACKENDS",
    "Collectives",
    "MPICollectives",
    "OneRank",
    "Pending",
    "World",
    "agree",
    "check_backend",
    "check_world",
    "init",
    "launched_rank",
    "launched_tasks",
    "make_collectives",
    "raise_together",
    "together",
]
