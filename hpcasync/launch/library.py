"""The installed MPI: its mpiexec, the flags for so many ranks, and variables that keep it quiet and its waits passive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcasync.errors import UsageError

COMMON = {"UCX_LOG_LEVEL": "error", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""Fewer cores than threads: a thread that waits must not spin. UCX warns of windows that a dead rank has not freed."""
OPENMPI = {"OMPI_MCA_osc": "^ucx", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_pml": "ob1"}
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OUTER = ("OMPI_COMM", "PMI_", "PMIX_", "PRTE_")
"""Variables of a job that this one is started from."""

WRAPPER = """trap '' USR1
trap : TERM
"$@"
code=$?
rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
page="$HPCASYNC_LAUNCH_FOLDER/rank-$rank"
(set -C; echo "$rank $code" >"$HPCASYNC_LAUNCH_FOLDER/first") 2>/dev/null
echo "$code" >"$page.tmp"
mv "$page.tmp" "$page"
"""
"""Around each rank whose end is to be known: it notes the exit code, and the first one that it is the first."""
OUTLIVE, FOLLOW = "exit 0", 'case $code in 13[0-9]|143) kill -"$((code - 128))" $$;; esac\nexit "$code"'
"""Its last words. Hydra's proxy kills the others when a child of its own is killed: in a job that is to outlive ranks none is. In
one that ends with them each is killed as its rank was: of 140 that exited with 137 instead Hydra (MPICH 5.0.2) missed 5 on a busy
machine, and the other ranks waited for ever."""


@dataclass(frozen=True)
class Library:
    """An mpiexec: ``name`` is ``"mpich"`` or ``"openmpi"``."""

    name: str
    mpiexec: str

    def command(self, ranks: int, program: list[str], survive: bool, noted: bool = False) -> list[str]:
        """What starts ``program`` on so many ranks of this machine; with ``survive`` the end of one does not end the others.

        Args:
            ranks: their number.
            program: one rank's command.
            survive: see above.
            noted: each rank's end is noted, as it always is with ``survive``.
        """
        if survive or noted:
            program = ["sh", "-c", WRAPPER + (OUTLIVE if survive else FOLLOW), "hpcasync-rank", *program]
        if self.name == "openmpi":
            crowded = ["--oversubscribe"] if ranks > (os.cpu_count() or 1) else []
            return [self.mpiexec, *crowded, *["--continuous"] * survive, "--bind-to", "none", "-n", str(ranks), *program]
        return [self.mpiexec, *["-disable-auto-cleanup"] * survive, "-n", str(ranks), *program]

    def environment(self, ranks: int, env: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The environment of the job; what the user has set stays."""
        found = {k: v for k, v in env.items() if not k.startswith(OUTER)}
        wanted = dict(COMMON)
        if self.name == "openmpi":
            wanted |= OPENMPI | (ROOT if hasattr(os, "geteuid") and os.geteuid() == 0 else {})
            if ranks > (os.cpu_count() or 1):
                wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"
        return wanted | found


def find_library() -> Library:
    """The mpiexec beside this Python, else the one on the PATH.

    Raises:
        UsageError: none, or of a library that is not known.
    """
    beside = Path(sys.prefix) / "bin" / "mpiexec"
    path = str(beside) if beside.exists() else shutil.which("mpiexec")
    if path is None:
        raise UsageError(f"no mpiexec in {beside.parent} or on the PATH; install one: pip install 'hpcasync[mpich]'")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    if "HYDRA" in said:
        return Library("mpich", path)
    if "Open MPI" in said or "prte" in said.lower():
        return Library("openmpi", path)
    raise UsageError(f"{path} is of an MPI that launch does not know (MPICH and Open MPI are); start the job with it yourself")
