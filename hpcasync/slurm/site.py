"""What one site wants of a batch script, read from its profile."""

from __future__ import annotations

import dataclasses
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError, unknown

FILES = Path(__file__).with_name("files")
"""The template and the profiles: the folder ``slurm`` of the repository."""

NEEDS = ("account", "partition", "qos")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site.

    Attributes:
        description: one line for people.
        needs: which of account, partition and qos a job is refused without.
        gpus_per_node: GPUs of a node, and so its ranks; 0 where that is not known.
        cpus_per_rank: as Slurm counts CPUs; 0 leaves it to Slurm.
        threads_per_core: how many of those CPUs are one core.
        mpi: ``--mpi`` of srun; ``"auto"`` asks the MPI library, empty leaves the site's default.
        local: folder on a disk of the node's own; the shell expands it.
        broadcast: copy the environment there first.
        setup: lines of shell before anything else.
        sbatch: options of sbatch.
        srun: options of srun.
        environment: variables of the job; the shell expands them.
        rank_environment: variables of each rank, such as its GPU, expanded on the rank.
    """

    description: str
    needs: list[str] = field(default_factory=list)
    gpus_per_node: int = 0
    cpus_per_rank: int = 0
    threads_per_core: int = 1
    mpi: str = "auto"
    local: str = "/tmp"
    broadcast: bool = False
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    srun: dict[str, str | int | bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    rank_environment: dict[str, str] = field(default_factory=dict)


def site_names() -> list[str]:
    """The sites that come with the package."""
    return sorted(path.stem for path in FILES.glob("*.toml"))


def read_site(name: str) -> Site:
    """The profile of a site that is known by ``name``, or of the file of that path.

    Raises:
        UsageError: an unknown name, no such file, not TOML, an unknown key, a value of another type or that would break the job.
    """
    if name.endswith(".toml") or "/" in name:
        return _read(Path(name))
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in site_names():
        raise unknown("site", name, site_names(), "A profile of your own: --site ./mine.toml.")
    return _read(FILES / f"{wanted}.toml")


def _read(path: Path) -> Site:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        keys: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--site {path}: {error.strerror}; expected a profile as in docs/slurm.md, or a known name") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--site {path}: not TOML ({error})") from error
    known = {f.name: f for f in dataclasses.fields(Site)}
    for key, value in keys.items():
        if key not in known:
            raise unknown("key", key, known, f"It stands in {path}.")
        _check(path, key, value, str(known[key].type))
    if "description" not in keys:
        raise UsageError(f"--site {path}: 'description' is missing; expected one line about the site")
    for need in keys.get("needs", []):
        if need not in NEEDS:
            raise unknown("need", need, NEEDS, f"It stands in {path}.")
    return Site(**keys)


_LEAST = {"gpus_per_node": 0, "cpus_per_rank": 0, "threads_per_core": 1}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RANKS = {
    "nodes": "--nodes",
    "ntasks": "--nodes, --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node, gpus_per_node of the profile",
    "cpus-per-task": "--cpus-per-rank, cpus_per_rank of the profile",
}
_OWN = {
    "sbatch": {
        **_RANKS,
        "job-name": "--name",
        "time": "--time",
        "array": "--array, --sweep",
        "output": "--output",
        "open-mode": "a requeued job appends",
        "requeue": "--max-restarts",
        "no-requeue": "--max-restarts",
        "signal": "--signal-lead",
    },
    "srun": {**_RANKS, "mpi": "--mpi, mpi of the profile"},
}
"""Options that a profile can't set, since the job would not be what was asked for; and what does."""
_KINDS: dict[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "list": (list, "a list of texts"),
    "dict": (dict, "a table"),
}


def _check(path: Path, key: str, value: Any, annotation: str) -> None:
    kind, words = _KINDS[annotation.split("[")[0]]
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is list:
        good = good and all(isinstance(v, str) for v in value)
    elif kind is dict:
        plain = str if annotation == "dict[str, str]" else (str, int, bool)
        good = good and all(isinstance(v, plain) for v in value.values())
        words = "a table of texts" if plain is str else "a table of texts, numbers and true or false"
    least = _LEAST.get(key)
    if good and least is not None and value < least:
        good, words = False, f"a whole number >= {least}"
    if not good:
        raise UsageError(f"--site {path}: {key} = {value!r}: expected {words}")
    # A job is written with these: what would end a line or a quotation there is found here.
    shell = key in ("setup", "environment", "rank_environment")
    names = value if kind is dict else {}
    for text in [*names.values()] if kind is dict else value if kind is list else [value]:
        if isinstance(text, str) and has_control(text, "\n\t" if shell else ""):
            words = "no control characters" if shell else "one line of text"
            raise UsageError(f"--site {path}: {key}: {text!r}: expected {words}")
    pattern, words = (_VARIABLE, "a variable's name") if shell else (_OPTION, "an option's name without dashes before it")
    for name in names:
        if not pattern.fullmatch(name):
            raise UsageError(f"--site {path}: [{key}] {name!r}: expected {words}")
        if remedy := set_by_submit(key, name):
            raise UsageError(f"--site {path}: [{key}] {name}: submit sets it itself ({remedy}); leave it out")


def set_by_submit(command: str, option: str) -> str | None:
    """What sets this option of ``"sbatch"`` or ``"srun"``, which also take the beginning of its name; None: a free one."""
    return next((remedy for name, remedy in _OWN.get(command, {}).items() if name.startswith(option)), None)


def has_control(text: str, allowed: str = "") -> bool:
    """Whether there are characters that end a line or control a terminal, or that UTF-8 lacks."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text if c not in allowed)
