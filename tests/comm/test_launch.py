"""What the launcher's environment says, and the refusal of N lonely worlds of one rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpcasync.comm import check_world, launched_rank, launched_tasks
from hpcasync.errors import UsageError
from tests.mpi import REPO

LAUNCHES = [
    (
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
        4,
        3,
        "Open MPI",
        "mpiexec that came with",
    ),
    ({"PMI_SIZE": "8", "PMI_RANK": "7"}, 8, 7, "PMI", "mpiexec that came with"),
    ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}, 2, 1, "MPICH", "mpiexec that came with"),
    ({"PALS_SIZE": "16", "PALS_RANKID": "2"}, 16, 2, "PALS", "mpiexec that came with"),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, 4, 2, "srun", "--mpi=pmi2"),
]


@pytest.mark.parametrize("env, tasks, rank, launcher, remedy", LAUNCHES)
def test_launchers(env: dict[str, str], tasks: int, rank: int, launcher: str, remedy: str) -> None:
    assert launched_tasks(env)[0] == tasks and launcher in launched_tasks(env)[1]
    assert launched_rank(env) == rank
    check_world(tasks, "an MPI", env)
    with pytest.raises(UsageError) as error:
        check_world(1, "Some MPI 1.0", env)
    text = str(error.value)
    for part in (launcher, f"started {tasks} tasks", "world of size 1", "Some MPI 1.0", remedy):
        assert part in text


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"PMI_SIZE": "", "PMI_RANK": ""},
        {"PMI_SIZE": "many"},
        {"SLURM_NTASKS": "4"},  # of the allocation, not of a step: an interactive shell has it too
    ],
)
def test_plain_python_is_fine(env: dict[str, str]) -> None:
    assert launched_tasks(env) == (1, "") and launched_rank(env) == 0
    check_world(1, "", env)


def outcome(env: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    """Runs a plain python process, as srun would with a process manager that MPI does not understand."""
    foreign = ("OMPI_", "PMI", "SLURM_", "PALS_", "MPI_LOCAL")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": str(REPO)} | env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_init_refuses_lonely_ranks() -> None:
    code = "import hpcasync as ha; ha.init()"
    done = outcome({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "UsageError: srun started 4 tasks, but MPI sees a world of size 1" in last
        and "srun --mpi=list" in last
    )


def test_init_without_mpi4py() -> None:
    """The import blocked for real: one rank still works, a launcher's ranks are refused."""
    block = """if True:
        import sys
        sys.modules["mpi4py"] = None
        import hpcasync as ha
        world = ha.init()
        print(world.rank, world.size, world.comm)
    """
    assert outcome({}, block).stdout.strip() == "0 1 None"
    done = outcome({"SLURM_STEP_NUM_TASKS": "4"}, block)
    assert done.returncode == 1 and "pip install 'hpcasync[mpich]'" in done.stderr


def test_import_neither_needs_nor_starts_mpi() -> None:
    code = """if True:
        import sys
        import hpcasync, hpcasync.rules, hpcasync.modes, hpcasync.store, hpcasync.comm
        assert not any(m.startswith("mpi4py") for m in sys.modules)
        print("fine")
    """
    assert outcome({}, code).stdout.strip() == "fine"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("device='gpu'", "device='gpu': expected"),
        ("device='cuda:99'", "device='cuda:99'"),
        ("threads=0", "threads=0: expected at least 1"),
    ],
)
def test_bad_arguments_of_init(arguments: str, says: str) -> None:
    done = outcome({}, f"import hpcasync as ha; ha.init(mpi=False, {arguments})")
    assert done.returncode == 1 and f"UsageError: {says}" in done.stderr
