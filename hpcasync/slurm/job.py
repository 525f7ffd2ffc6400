"""One job: what the user asked for and what the site wants, rendered into a batch script."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError
from hpcasync.slurm.site import FILES, Site

LAUNCHERS = ("srun", "mpiexec")
QUOTE = re.compile(r'(\\.)|"', re.DOTALL)
"""A double quote, or (1) an escaped character."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run on how many nodes. `render` turns it into a script.

    Attributes:
        program: arguments of Python, such as ``("-m", "hpcasync", "train", ...)``.
        folder: of the run: the script, Slurm's output and, for ``train``, the records.
        nodes: number of nodes.
        ranks_per_node: number of ranks on each.
        time: limit, in Slurm's form.
        name: of the job.
        variants: per array index the arguments that only it has; empty without an array.
        at_a_time: elements of the array that may run at once; ``None``: all.
        cpus_per_rank: as Slurm counts CPUs; 0 leaves it to Slurm.
        launcher: srun or mpiexec.
        mpi: ``--mpi`` of srun, empty for the site's default.
        options: more options of sbatch; they win over the site's.
        extra: words for sbatch, last.
        lead: seconds before the time limit at which to ask for a checkpoint.
        max_restarts: how often the job may requeue itself.
        python: interpreter.
        archive: of the environment, to copy to the nodes' disks; ``None`` leaves it where it is.
        setup_file: shell file that the script sources.
        command: the line that made this job, for the script's head.
    """

    program: Sequence[str]
    folder: Path
    nodes: int
    ranks_per_node: int
    time: str
    name: str
    variants: Sequence[tuple[int, Sequence[str]]] = ()
    at_a_time: int | None = None
    cpus_per_rank: int = 0
    launcher: str = "srun"
    mpi: str = ""
    options: dict[str, str | int | bool]
    extra: Sequence[str] = ()
    lead: int = 120
    max_restarts: int = 20
    python: Path = Path(sys.executable)
    archive: Path | None = None
    setup_file: Path | None = None
    command: str = ""

    @property
    def script(self) -> Path:
        """Where the script belongs."""
        return self.folder / "job.sh"


def render(job: Job, site: Site) -> str:
    """The batch script."""
    import jinja2

    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    template.filters["sh"] = lambda value: shlex.quote(str(value))
    cpus = job.cpus_per_rank
    threads = {"OMP_NUM_THREADS": str(max(1, cpus // site.threads_per_core))} if cpus else {}
    # A rank that dies takes the others with it a minute later. --kill-on-bad-exit would do so at once, but for 75 as well,
    # and a rank that leaves with 75 a little later than the first would get SIGTERM.
    srun = {**({"mpi": job.mpi} if job.mpi else {}), "wait": 60, **site.srun}
    return template.from_string((FILES / "job.sh.j2").read_text(encoding="utf-8")).render(
        site=site,
        flags=_flags(job, site),
        command=job.command,
        environment={k: _quoted(v) for k, v in (threads | site.environment).items()},
        on_rank=_on_rank(site),
        setup_file=job.setup_file,
        cpus_per_rank=cpus,
        max_restarts=job.max_restarts,
        script=job.script,
        python=job.python,
        python_name=job.python.name,
        broadcast=job.archive is not None,
        archive=job.archive,
        variants=[(index, shlex.join(words)) for index, words in job.variants],
        mpiexec=job.launcher == "mpiexec",
        srun=shlex.join(_options(srun)),
        program=shlex.join(job.program),
    )


def _quoted(value: str) -> str:
    """A value in double quotes, where the shell expands it; its own quotes stay unless they are a command's."""
    plain = "$(" not in value and "`" not in value
    return f'"{re.sub(QUOTE, lambda m: m[1] or chr(92) + m[0], value) if plain else value}"'


def _on_rank(site: Site) -> str:
    """What the shell of each rank does, or nothing."""
    exports = "".join(f"export {name}={_quoted(value)}; " for name, value in site.rank_environment.items())
    return exports and exports + 'exec "$@"'


def check_script(script: str, site: Site, name: str) -> None:
    """Refuse a script that bash could not read.

    Raises:
        UsageError: what the profile ``name`` brings to it does not parse.
    """
    bash = shutil.which("bash")
    for text in (script, _on_rank(site)) if bash else ():
        done = subprocess.run([str(bash), "-n"], input=text, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0].replace("syntax error: ", "")
            raise UsageError(
                f"--site {name}: bash can't read the script that it gives ({said}); look at its setup, [environment] and "
                "[rank_environment]: a value stands in double quotes there"
            )


def _flags(job: Job, site: Site) -> list[str]:
    """The options of sbatch, in the order of the script."""
    array = bool(job.variants)
    options: dict[str, str | int | bool] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        **({"cpus-per-task": job.cpus_per_rank} if job.cpus_per_rank else {}),
        "time": job.time,
        **({"array": _indices(job)} if array else {}),
        **site.sbatch,
        **job.options,
        "output": str(job.folder / ("slurm-%A_%a.out" if array else "slurm-%j.out")),
        "open-mode": "append",  # a requeued job goes on in the same file
        "requeue": True,
        "signal": f"B:USR1@{job.lead}",
    }
    return [shlex.quote(word) for word in [*_options(options), *job.extra]]


def _options(options: dict[str, Any]) -> list[str]:
    """``--key=value``, ``--key`` for true, nothing for false."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not False]


def _indices(job: Job) -> str:
    """The array's indices, runs of them as ranges."""
    runs: list[list[int]] = []
    for index in sorted(index for index, _ in job.variants):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return text + (f"%{job.at_a_time}" if job.at_a_time else "")


def mpi_plugin(python: Path) -> str:
    """The ``--mpi`` of srun that an environment's MPI library understands.

    Returns:
        ``pmi2``, ``pmix``, or empty: leave it to the site (Cray MPICH, unknown libraries).

    Raises:
        UsageError: MPI can't be loaded.
    """
    # In a process of its own and without MPI_Init, which some sites forbid on login nodes.
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"{python} can't load MPI here ({last}): load the site's module, or say which with --mpi")
    version = done.stdout
    if "CRAY" in version:
        return ""
    if "Open MPI" in version:
        return "pmix"
    return "pmi2" if any(name in version for name in ("MPICH", "Intel", "MVAPICH")) else ""
