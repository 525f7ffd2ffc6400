"""A real `hpcasync launch --survive` job whose ranks a test kills and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mpi import COMMON_ENV, TOKEN, Lane, processes_of


class SurvivingJob:
    """Started at once; use it as a context manager, so that nothing is left.

    Args:
        lane: whose Python and MPI.
        output: the run's folder.
        words: of `train`.
        ranks: at the start.
        before: words of `launch`.
        env: more variables.
    """

    def __init__(
        self, lane: Lane, output: Path, *words: object, ranks: int = 4, before: tuple[str, ...] = ("--survive",), env: Any = None
    ) -> None:
        self.output, self._mark = output, uuid.uuid4().hex
        train = ["train", "--threads", "1", "--output", output, "--json", *words]
        command = [lane.python, "-m", "hpcasync", "launch", "-n", ranks, *before, "--", *train]
        variables = os.environ | COMMON_ENV | (env or {}) | {TOKEN: self._mark}
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )

    def __enter__(self) -> SurvivingJob:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # the launcher ends its ranks
            self.process.communicate(timeout=250)

    def pids(self) -> dict[int, int]:
        """Process ids of the living ranks."""
        found = {}
        for pid in processes_of(self._mark):
            try:
                lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                shell = not Path(f"/proc/{pid}/comm").read_text().startswith("python")
            except OSError:  # it ended just now
                continue
            variables = dict(line.split(b"=", 1) for line in lines if b"=" in line)
            rank = variables.get(b"PMI_RANK", variables.get(b"OMPI_COMM_WORLD_RANK"))
            if rank is not None and not shell:
                found[int(rank)] = pid
        return found

    def send(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a rank a signal."""
        os.kill(self.pids()[rank], number)

    def epochs(self) -> int:
        """Evaluations so far."""
        try:
            return len((self.output / "metrics.jsonl").read_text().splitlines())
        except OSError:
            return 0

    def wait_epochs(self, more: int, seconds: float = 240) -> None:
        """Return when so many more epochs have been evaluated."""
        goal = self.epochs() + more
        self.wait(lambda: self.epochs() >= goal, f"epoch {goal}", seconds)

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Return when ``ready()``."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended before {what}: {self.process.communicate()}")
            assert time.monotonic() < deadline, f"no {what} within {seconds} s; alive: {self.pids()}"
            time.sleep(0.02)

    def end(self, seconds: float = 240) -> tuple[int, dict[str, Any], str]:
        """Wait for the end: exit code, result, standard error."""
        out, err = self.process.communicate(timeout=seconds)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return self.process.returncode, json.loads(lines[-1]) if lines else {}, err
