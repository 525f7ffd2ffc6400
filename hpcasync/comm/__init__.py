"""Ranks, nodes, devices, collectives and launch checks."""

from hpcasync.comm.agree import agree, raise_together
from hpcasync.comm.collectives import Collectives, MPICollectives, OneRank, Pending
from hpcasync.comm.launch import check_world, launched_rank, launched_tasks
from hpcasync.comm.world import World, init

__all__ = [
    "Collectives",
    "MPICollectives",
    "OneRank",
    "Pending",
    "World",
    "agree",
    "check_world",
    "init",
    "launched_rank",
    "launched_tasks",
    "raise_together",
]
