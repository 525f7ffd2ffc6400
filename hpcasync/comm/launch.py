"""What the launcher says about this process, read from the environment before MPI is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hpcasync.errors import UsageError

# (variable with the number of tasks, variable with this task's rank, launcher, remedy)
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI's mpiexec"),
    ("PMI_SIZE", "PMI_RANK", "an mpiexec or srun that speaks PMI (MPICH, Intel MPI, Cray)"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID", "MPICH's mpiexec"),
    ("PALS_SIZE", "PALS_RANKID", "PALS"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
)


def launched_tasks(env: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many tasks the launcher started, and which launcher it was; ``(1, "")`` for a plain ``python``."""
    for size, _, launcher in _LAUNCHERS:
        if env.get(size, "").isdigit() and int(env[size]) > 1:
            return int(env[size]), launcher
    return 1, ""


def launched_rank(env: Mapping[str, str] = os.environ) -> int:
    """This task's rank as the launcher gave it, 0 when there is none: for output before MPI is initialised."""
    for _, rank, _ in _LAUNCHERS:
        if env.get(rank, "").isdigit():
            return int(env[rank])
    return 0


def check_world(size: int, library: str, env: Mapping[str, str] = os.environ) -> None:
    """Refuse a job in which the launcher started several tasks but MPI sees only one.

    Raises:
        UsageError: every task would train alone, on all data, and overwrite the others' output.
    """
    tasks, launcher = launched_tasks(env)
    if size > 1 or tasks == 1:
        return
    if launcher == "srun":
        remedy = (
            "srun used a process manager that this MPI does not understand: try `srun --mpi=pmi2` (MPICH, Intel MPI, "
            "Cray) or `srun --mpi=pmix` (Open MPI); `srun --mpi=list` shows what the site offers"
        )
    else:
        remedy = "use the mpiexec that came with this MPI (in this environment: the one beside `python`)"
    found = library or "none could be loaded"
    raise UsageError(f"{launcher} started {tasks} tasks, but MPI sees a world of size 1. MPI here: {found}. {remedy}.")
