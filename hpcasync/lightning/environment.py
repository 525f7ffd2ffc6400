"""The ranks as Lightning asks for them."""

from __future__ import annotations

import socket

from lightning.fabric.plugins.environments import ClusterEnvironment

from hpcasync.comm import World


class WorldEnvironment(ClusterEnvironment):
    """A ``ClusterEnvironment`` that says what a `World` says. mpiexec or srun has started the processes.

    Given by the strategy, so that Lightning does not guess from the variables of Slurm, torchrun or LSF.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return socket.gethostname()

    @property
    def main_port(self) -> int:
        raise RuntimeError("the ranks are connected by MPI, there is no port")

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """mpiexec decides."""

    def global_rank(self) -> int:
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """mpiexec decides."""

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.node
