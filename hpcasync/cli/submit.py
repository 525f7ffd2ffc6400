"""``hpcasync submit``: a batch script for one site, handed to Slurm."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError, unknown


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "submit",
        help="run a command on a Slurm cluster",
        description="Write a batch script for a site and hand it to Slurm. The job saves a checkpoint shortly before its time "
        "limit or when it is preempted, queues itself again and goes on. See docs/slurm.md.",
        usage="hpcasync submit --site SITE --nodes N [options] -- train ...",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--site", default="generic", help="a known site or a profile.toml (default: generic)")
    where.add_argument("-N", "--nodes", type=int, required=True, help="number of nodes")
    where.add_argument("--ranks-per-node", type=int, metavar="N", help="default: one per GPU of the site's nodes")
    where.add_argument("--cpus-per-rank", type=int, metavar="N", help="as Slurm counts CPUs (default: the site's)")
    where.add_argument("-A", "--account", help="project to charge")
    where.add_argument("-p", "--partition", help="default: the site's")
    where.add_argument("--qos", help="default: the site's")
    where.add_argument("--nodelist", metavar="NODES", help="these nodes, such as n[1-4]")
    where.add_argument("--exclude", metavar="NODES", help="not these nodes")
    where.add_argument("--sbatch", action="append", default=[], metavar="=--OPTION", help="one more option of sbatch; repeatable")
    what = parser.add_argument_group("what")
    what.add_argument("--array", metavar="INDICES", help="one run per seed: 0-4, 1,3,5, 0-99%%8 (8 at a time)")
    what.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V", help="one run per value of a flag; repeatable")
    what.add_argument("--output", metavar="DIR", help="folder of the run (default: runs/<time>-<name>)")
    what.add_argument("--name", help="of the job (default: the command's)")
    what.add_argument("--dry-run", action="store_true", help="print the script and do nothing")
    how = parser.add_argument_group("how")
    how.add_argument("-t", "--time", default="1:00:00", help="limit: minutes, h:m:s or d-h (default: 1:00:00)")
    how.add_argument("--signal-lead", type=int, default=120, metavar="SECONDS", help="checkpoint this long before (default: 120)")
    how.add_argument("--max-restarts", type=int, default=20, metavar="N", help="how often it may queue again (default: 20)")
    how.add_argument("--launcher", default="srun", help="srun or mpiexec (default: srun)")
    how.add_argument("--mpi", help="--mpi of srun (default: the site's, or what fits the MPI library here)")
    how.add_argument("--setup", metavar="FILE", help="shell file that the job sources first: modules, variables")
    how.add_argument(
        "--broadcast", action=argparse.BooleanOptionalAction, help="copy the environment to the nodes (default: the site's)"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- and a command of hpcasync, or a script.py, with arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Render the script; print it, or write it and submit it."""
    from hpcasync.comm.launch import launched_tasks
    from hpcasync.slurm import check_script, render

    tasks, launcher = launched_tasks()
    if tasks > 1:
        raise UsageError(f"submit was started {tasks} times by {launcher}; run it once, without a launcher")
    site, job = make_job(args)
    script = render(job, site)
    check_script(script, site, args.site)
    if args.dry_run:
        print(script, end="")
        return 0
    sbatch = _slurm("sbatch")
    _check_plugin(job.mpi if job.launcher == "srun" else "")
    if job.archive is not None:
        from hpcasync.slurm import pack

        pack()
    with _written(job.script, script):
        done = subprocess.run([sbatch, "--parsable", str(job.script)], capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"sbatch refused the job: {' '.join(done.stderr.split())}; --dry-run shows the script")
    number = done.stdout.strip().split(";")[0]
    print(f"submitted job {number}: {job.script}")
    return 0


@contextlib.contextmanager
def _written(path: Path, script: str) -> Iterator[None]:
    """The script under its name; when the block fails it goes again, and with it the folders that were made for it."""
    made: list[Path] = []
    try:
        try:
            if path.exists():
                raise UsageError(f"{path} exists: a job was submitted from there; choose another --output, or sbatch that one")
            made = [path, *(folder for folder in path.parents if not folder.exists())]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(script, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"can't write {path}: {error.strerror}; choose another --output") from error
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for mine in made:
                mine.unlink(missing_ok=True) if mine == path else mine.rmdir()
        raise


def make_job(args: argparse.Namespace) -> tuple[Any, Any]:
    """The site and the job that the flags ask for.

    Raises:
        UsageError: a value that Slurm or the site would refuse; arguments that the command itself would refuse.
    """
    from hpcasync.slurm import Job, mpi_plugin, parse_nodelist, parse_time, read_site
    from hpcasync.slurm.environment import archive_of
    from hpcasync.slurm.job import LAUNCHERS

    _check_texts(args)
    site = read_site(args.site)
    for flag, least in (("nodes", 1), ("ranks_per_node", 1), ("cpus_per_rank", 1), ("signal_lead", 1), ("max_restarts", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UsageError(f"--{flag.replace('_', '-')}={value}: expected a whole number >= {least}")
    ranks = args.ranks_per_node or site.gpus_per_node
    if not ranks:
        raise UsageError(f"site {args.site!r} does not know its nodes: give --ranks-per-node, one per GPU where there are GPUs")
    if args.launcher not in LAUNCHERS:
        raise unknown("launcher", args.launcher, LAUNCHERS)
    seconds = parse_time(args.time)
    if seconds <= args.signal_lead:
        raise UsageError(
            f"--time {args.time} is {seconds} s, and the checkpoint is asked for {args.signal_lead} s before its end: "
            "give more time, or a shorter --signal-lead"
        )
    options = {name: getattr(args, name) for name in ("account", "partition", "qos") if getattr(args, name)}
    for need in site.needs:
        if need not in options and need not in site.sbatch and not os.environ.get(f"SBATCH_{need.upper()}"):
            raise UsageError(f"site {args.site!r} refuses a job without --{need}; give it one")
    for flag in ("nodelist", "exclude"):
        if getattr(args, flag):
            names = parse_nodelist(getattr(args, flag), f"--{flag}")
            if flag == "nodelist" and len(names) > args.nodes:
                raise UsageError(f"--nodelist names {len(names)} nodes, and --nodes is {args.nodes}")
            options[flag] = getattr(args, flag)
    if args.setup and not Path(args.setup).is_file():
        raise UsageError(f"--setup {args.setup}: no such file; expected shell commands such as 'module load ...'")

    rows, at_a_time = _rows(args)
    kind, program, name = _program(args, rows, args.nodes, ranks)
    folder = Path(args.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}").absolute()
    places = (lambda where: ["--output", str(where), "--resume", "auto"]) if kind == "train" else (lambda where: [])
    plugin = args.mpi if args.mpi is not None else site.mpi
    if plugin == "auto":
        plugin = mpi_plugin(Path(sys.executable)) if args.launcher == "srun" else ""
    broadcast = site.broadcast if args.broadcast is None else args.broadcast
    job = Job(
        program=program if rows else [*program, *places(folder)],
        folder=folder,
        nodes=args.nodes,
        ranks_per_node=ranks,
        time=args.time,
        name=name,
        variants=[(index, [*row, *places(folder / str(index))]) for index, row in rows],
        at_a_time=at_a_time,
        cpus_per_rank=args.cpus_per_rank or site.cpus_per_rank,
        launcher=args.launcher,
        mpi=plugin,
        options=options,
        extra=args.sbatch,
        lead=args.signal_lead,
        max_restarts=args.max_restarts,
        archive=archive_of(Path(sys.prefix)) if broadcast else None,
        setup_file=Path(args.setup).absolute() if args.setup else None,
        command=shlex.join(["hpcasync", *sys.argv[1:]]).replace("\n", " "),
    )
    return site, job


def _check_texts(args: argparse.Namespace) -> None:
    """Refuse what would end a line of the script, and options of sbatch that are none or submit's own."""
    from hpcasync.slurm.site import has_control, set_by_submit

    for key, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            # An argument of the program stands in quotes, where a line may end.
            if isinstance(text, str) and has_control(text, "\n\t" if key == "program" else ""):
                flag = "an argument after --" if key == "program" else f"--{key.replace('_', '-')}"
                raise UsageError(f"{flag} {text!r}: expected text without control characters")
    for word in args.sbatch:
        match = re.fullmatch(r"--([A-Za-z][A-Za-z0-9_-]*)(=.*)?", word)
        if match is None:
            raise UsageError(f"--sbatch {word!r}: expected one option in its long form, such as --sbatch=--comment='two words'")
        if remedy := set_by_submit("sbatch", match[1]):
            raise UsageError(f"--sbatch={word}: submit sets that itself ({remedy}); leave it out")


def _check_ranks(config: Any, nodes: int, ranks: int) -> None:
    """What the job would refuse once it knows its ranks: ``ranks`` on each of the nodes."""
    from hpcasync.comm.groups import groups_problem
    from hpcasync.comm.host_ranks import host_ranks_problem
    from hpcasync.train.slow import parse_slow

    hosts = config.host_ranks or 0
    problem = host_ranks_problem(hosts, [ranks] * nodes) if hosts else None
    if config.mode == "hierarchical":
        problem = groups_problem(config.groups, nodes, ranks)
    if problem is not None:
        raise UsageError(problem)
    parse_slow(config.slow, nodes * (ranks - hosts), least=1)


def _program(args: argparse.Namespace, rows: list[tuple[int, list[str]]], nodes: int, ranks: int) -> tuple[str, list[str], str]:
    """What kind of program it is (``train``, ``command``, ``script``), the arguments of Python, and the job's name.

    Every run's flags are read here too: a slip of the pen should not wait in a queue first.
    """
    words = [w for i, w in enumerate(args.program) if i or w != "--"]
    if not words:
        raise UsageError("nothing to run: give it after --, such as  -- train --data digits")
    given = {w.partition("=")[0] for w in words}
    for flag in {w for _, row in rows for w in row if w.startswith("--")}:
        if flag in given:
            raise UsageError(f"{flag} is given twice: --array or --sweep sets it for each run; leave it out after --")
    if words[0].endswith(".py"):
        script = Path(words[0])
        if not script.is_file():
            raise UsageError(f"{words[0]}: no such file; expected a command of hpcasync or a Python script")
        return "script", [str(script.absolute()), *words[1:]], _name(args.name or script.stem)
    from hpcasync.cli.parser import make_parser

    parsed = [make_parser(words).parse_args([*words, *row]) for _, row in rows or [(0, [])]]
    if words[0] != "train":
        return "command", ["-m", "hpcasync", *words], _name(args.name or words[0])
    from hpcasync.cli.train import config_of

    for flag, why in (("--output", "submit's own --output says where"), ("--resume", "a job of submit always resumes")):
        if flag in given:
            raise UsageError(f"leave {flag} of train out: {why}")
    configs = [config_of(p, workers=lambda: nodes * ranks) for p in parsed]
    for config in configs:
        _check_ranks(config, nodes, ranks)
    return "train", ["-m", "hpcasync", *words], _name(args.name or configs[0].name)


def _rows(args: argparse.Namespace) -> tuple[list[tuple[int, list[str]]], int | None]:
    """Per index of the array the flags that only it has, and how many may run at a time; no rows without an array."""
    from hpcasync.slurm import parse_array, parse_sweep

    seeds, at_a_time = parse_array(args.array) if args.array is not None else ([], None)
    if not args.sweep:  # the index is the seed
        return [(seed, ["--seed", str(seed)]) for seed in seeds], at_a_time
    combinations = parse_sweep(args.sweep)
    if seeds and "--seed" in combinations[0]:
        raise UsageError("--array and --sweep both set --seed; give the seeds to one of them")
    flags = [["--seed", str(seed)] for seed in seeds] or [[]]
    return list(enumerate([*row, *seed] for row in combinations for seed in flags)), at_a_time


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)


def _slurm(command: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise UsageError(f"no {command} on PATH: submit runs where Slurm's commands are (a login node); --dry-run works anywhere")
    return found


def _check_plugin(plugin: str) -> None:
    """Refuse a ``--mpi`` that this Slurm does not have, before the job waits for its turn."""
    if not plugin:
        return
    done = subprocess.run([_slurm("srun"), "--mpi=list"], capture_output=True, text=True)
    known = re.findall(r"^\s+(\w+)$|available: (.*)$", done.stdout + done.stderr, re.MULTILINE)  # it writes to either
    known = [word for pair in known for word in re.findall(r"\w+", " ".join(pair))]
    if done.returncode == 0 and known and plugin not in known:
        raise unknown("--mpi", plugin, known, "This is what `srun --mpi=list` shows here.")
