"""Fixtures of the Slurm lane: a real cluster of two hosts, and `submit`, which sends our own scripts to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests import hosts
from tests.mpi import COMMON_ENV, REPO, Lane, require_lane
from tests.slurm import cluster
from tests.slurm.cluster import Cluster


def require(reason: str) -> NoReturn:
    """Skip for this reason; HPCASYNC_REQUIRE_SLURM=1 (`.ci/run`) makes it a failure nobody can miss."""
    if os.environ.get("HPCASYNC_REQUIRE_SLURM") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Two nodes of 4 CPUs and 2 GPUs on hosts of their own."""
    reason = cluster.missing() or hosts.missing()
    if reason is not None:
        require(reason)
    with hosts.Hosts(2, rate="10gbit") as two, Cluster(two) as running:
        yield running


class Submitted:
    """A job that `hpcasync submit` has handed to the cluster."""

    def __init__(self, slurm: Cluster, number: int, folder: Path) -> None:
        self.slurm, self.number, self.folder = slurm, number, folder

    def output(self, element: int | None = None) -> str:
        """What the job has written so far."""
        name = f"slurm-{self.number}.out" if element is None else f"slurm-{self.number}_{element}.out"
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, *states: str, timeout: float = 150) -> str:
        """Wait for a state, by default for the end; on failure say what the job has written."""
        try:
            return self.slurm.wait(self.number, *states, timeout=timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n-- output\n{self.output()}") from None

    def wait_for(self, text: str, timeout: float = 150) -> None:
        """Wait until the job has written ``text``."""
        self.slurm.until(lambda: text in self.output(), f"'{text}'", timeout, lambda: f"-- output\n{self.output()}")

    @property
    def facts(self) -> dict[str, str]:
        return self.slurm.job(self.number)


class Submit:
    """The fixture `submit`: `submit("--nodes", 2, ..., "--", "train", ...)` as a user of the login host."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.numbers: list[int] = []
        self._count = 0

    def __call__(self, *words: str | int | Path, lane: Lane | None = None) -> Submitted:
        """Submit from ``lane`` (default MPICH) into a folder of its own."""
        self._count += 1
        run = self.folder / f"run{self._count}"
        done = self.command("--output", run, *words, lane=lane)
        assert done.returncode == 0, done.stderr
        self.numbers.append(int(done.stdout.split()[2].rstrip(":")))
        return Submitted(self.slurm, self.numbers[-1], run)

    def command(self, *words: str | int | Path, lane: Lane | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``hpcasync submit``, whatever comes of it."""
        lane = lane or require_lane("mpich")
        env = {**COMMON_ENV, **lane.env, "PYTHONPATH": str(REPO)}
        del env["OMP_NUM_THREADS"]  # the script's own
        command = ["env", "-C", self.folder, *lane.cli, "submit", *map(str, words)]
        return self.slurm.run(command, env=env, check=False)


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """Runs `hpcasync submit` on the cluster's login host; what still runs after the test is cancelled."""
    submit = Submit(slurm, tmp_path)
    yield submit
    if submit.numbers:
        slurm.run(["scancel", "--quiet", *map(str, submit.numbers)], check=False)
