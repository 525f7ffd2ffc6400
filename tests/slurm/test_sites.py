"""The batch script of every site, letter by letter, and profiles that are wrong.

After a wanted change: HPCASYNC_UPDATE_GOLDEN=1 pytest tests/slurm/test_sites.py, then read the diff of tests/slurm/golden.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from hpcasync.errors import UsageError
from hpcasync.slurm import Job, Site, check_script, read_site, render, site_names
from hpcasync.slurm.site import FILES

GOLDEN = Path(__file__).with_name("golden")
TRAIN = ("-m", "hpcasync", "train", "--data", "cifar-10", "--model", "resnet20", "--mode", "kstep")


def _job(site: Site, **more: object) -> Job:
    options: dict[str, object] = {
        "program": [*TRAIN, "--output", "/scratch/run", "--resume", "auto"],
        "folder": Path("/scratch/run"),
        "nodes": 8,
        "ranks_per_node": site.gpus_per_node or 4,
        "time": "2:00:00",
        "name": "resnet",
        "cpus_per_rank": site.cpus_per_rank,
        "mpi": "pmi2" if site.mpi == "auto" else site.mpi,
        "options": {"account": "project_1"} if "account" in site.needs else {},
        "python": Path("/opt/env/bin/python3"),
        "archive": Path("/scratch/cache/env.tar") if site.broadcast else None,
        "command": "hpcasync submit ...",
    }
    return Job(**(options | more))  # type: ignore[arg-type]


def _compare(text: str, name: str) -> None:
    path = GOLDEN / name
    if os.environ.get("HPCASYNC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; see the head of this file"
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", site_names())
def test_golden(name: str) -> None:
    site = read_site(name)
    _compare(render(_job(site), site), f"{name}.sh")


def test_golden_of_an_array_under_mpiexec() -> None:
    """Every part of the template that no site has by itself, and names that the shell must not take apart."""
    site = read_site("generic")
    folder = Path("/scratch/a run's")
    job = _job(
        site,
        program=TRAIN,
        folder=folder,
        launcher="mpiexec",
        variants=[(i, ["--seed", str(i), "--output", str(folder / str(i)), "--resume", "auto"]) for i in (0, 1, 2, 7)],
        at_a_time=2,
        cpus_per_rank=6,
        options={"partition": "gpu", "nodelist": "n[1-8]"},
        extra=["--mail-type=END"],
        lead=300,
        max_restarts=3,
        archive=Path("/scratch/the cache/env.tar"),
        setup_file=Path("/home/me/my modules.sh"),
    )
    _compare(render(job, site), "array-mpiexec.sh")


def test_every_site_says_where_its_facts_are_from() -> None:
    for name in site_names():
        assert name == "generic" or "# Source" in (FILES / f"{name}.toml").read_text(), name


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "mine"\ngpus_per_node = 3\n[sbatch]\nexclusive = true\n[srun]\nwait = 5\n')
    site = read_site(str(path))
    text = render(_job(site), site)
    assert "#SBATCH --exclusive\n" in text and "srun --mpi=pmi2 --wait=5 " in text and "--ntasks-per-node=3" in text


@pytest.mark.parametrize(
    "text, why",
    [
        ("description = = 1", "not TOML"),
        ('description = "x"\ngpus_per_nod = 4', "unknown key 'gpus_per_nod'; did you mean 'gpus_per_node'"),
        ('description = "x"\ngpus_per_node = "4"', "gpus_per_node = '4': expected a whole number"),
        ('description = "x"\nbroadcast = 1', "expected true or false"),
        ('description = "x"\nneeds = ["acount"]', "unknown need 'acount'; did you mean 'account'"),
        ('description = "x"\nsetup = [1]', "expected a list of texts"),
        ('description = "x"\n[environment]\nX = 1', "expected a table of texts"),
        ('description = "x"\n[srun]\nx = [1]', "expected a table of texts, numbers and true or false"),
        ("gpus_per_node = 4", "'description' is missing"),
        ('description = "x"\nthreads_per_core = 0', "threads_per_core = 0: expected a whole number >= 1"),
        ('description = "x"\ngpus_per_node = -2', "gpus_per_node = -2: expected a whole number >= 0"),
        ('description = "x"\ncpus_per_rank = -4', "cpus_per_rank = -4: expected a whole number >= 0"),
        ('description = "x\\ny"', "expected one line of text"),
        ('description = "x"\n[sbatch]\ncomment = "x\\ny"', "expected one line of text"),
        ('description = "x"\n[sbatch]\nnodes = 5', "[sbatch] nodes: submit sets it itself (--nodes)"),
        ('description = "x"\n[srun]\nmpi = "pmix"', "[srun] mpi: submit sets it itself"),
        ('description = "x"\n[sbatch]\n"--gres" = "x"', "[sbatch] '--gres': expected an option's name"),
        ('description = "x"\n[environment]\n"A B" = "1"', "[environment] 'A B': expected a variable's name"),
        ('description = "x"\n[rank_environment]\n"1A" = "1"', "[rank_environment] '1A': expected a variable's name"),
    ],
)
def test_bad_profile(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_site(str(path))
    assert why in str(error.value) and "bad.toml" in str(error.value)


def test_values_of_the_environment_arrive(tmp_path: Path) -> None:
    """Quotes as they are, variables expanded; run by a shell, for the job and for a rank."""
    path = tmp_path / "mine.toml"
    values = """A = "it's"\nB = '{"a b": 1}'\nC = '$(echo "x  y")'\nD = '$HOME/d'\nE = 'a \\" b'\n"""
    path.write_text(f'description = "x"\n[environment]\n{values}[rank_environment]\n{values}')
    site = read_site(str(path))
    script = render(_job(site, cpus_per_rank=0), site)
    check_script(script, site, "mine")
    exports = [line for line in script.splitlines() if line.startswith("export ") and "SRUN" not in line]
    rank = next(line for line in script.splitlines() if line.startswith("    bash -c ")).removesuffix(" \\")
    tell = """printf '%s\\n' "$A" "$B" "$C" "$D" "$E" """
    for code in ("\n".join([*exports, tell]), f"{rank} bash -c {shlex.quote(tell)}"):
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env={"HOME": "/h", "PATH": os.defpath})
        assert done.stdout.splitlines() == ["it's", '{"a b": 1}', "x  y", "/h/d", 'a " b'], done.stderr


@pytest.mark.parametrize("lines", ["setup = ['if true']", "[environment]\nX = 'a\\'", "[rank_environment]\nX = '$('"])
def test_a_profile_that_bash_cannot_read(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'description = "x"\n{lines}')
    site = read_site(str(path))
    with pytest.raises(UsageError, match="--site bad: bash can't read the script"):
        check_script(render(_job(site), site), site, "bad")


def test_unknown_site() -> None:
    with pytest.raises(UsageError, match="unknown site 'perlmuter'; did you mean 'perlmutter'"):
        read_site("perlmuter")
    with pytest.raises(UsageError, match="No such file"):
        read_site("./gone.toml")
    assert read_site("LUMI_G").gpus_per_node == 8
