"""`hpcasync submit` without a cluster: what it prints, and one clear error for what would fail later."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpcasync.cli import main

GENERIC = ("submit", "--nodes", "2", "--ranks-per-node", "4")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the repository and from any allocation that this process may itself run in."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)


def _script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_dry_run_prints_the_script_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = ("submit", "--site", "frontier", "--nodes", "8", "--account", "abc123", "--no-broadcast", "--time", "2:00:00")
    script = _script(capsys, *site, "--output", "out", "--dry-run", "--", "train", "--mode", "kstep", "--every", "16")
    for line in ("nodes=8", "ntasks-per-node=8", "cpus-per-task=7", "account=abc123", "time=2:00:00", "signal=B:USR1@120"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --job-name=digits-mlp-kstep\n" in script
    assert f"-m hpcasync train --mode kstep --every 16 --output {tmp_path}/out --resume auto &" in script
    assert list(tmp_path.iterdir()) == []


def test_a_command_and_a_script_get_no_flags_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("")
    assert f'"$python" {tmp_path}/mine.py --lr 1 &' in _script(capsys, *GENERIC, "--dry-run", "--", "mine.py", "--lr", "1")
    assert '"$python" -m hpcasync list --json &' in _script(capsys, *GENERIC, "--dry-run", "--", "list", "--json")


def test_seeds_and_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    script = _script(capsys, *GENERIC, "--output", "/o", "--array", "0-2%2", "--dry-run", "--", "train")
    assert "#SBATCH --array=0-2%2\n" in script and " 2) set -- --seed 2 --output /o/2 --resume auto ;;" in script
    sweep = ("--sweep", "lr=0.1,0.05", "--array", "7,9")
    script = _script(capsys, *GENERIC, "--output", "/o", *sweep, "--dry-run", "--", "train")
    assert "#SBATCH --array=0-3\n" in script
    assert " 0) set -- --lr 0.1 --seed 7 --output /o/0 --resume auto ;;" in script
    assert " 3) set -- --lr 0.05 --seed 9 --output /o/3 --resume auto ;;" in script


def test_flags_win_over_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    site = ("submit", "--site", "perlmutter", "--nodes", "1", "-A", "m1_g", "--ranks-per-node", "2", "--cpus-per-rank", "8")
    more = ("--qos", "debug", "--mpi", "pmi2", "--sbatch=--mail-type=END", "--nodelist", "nid[001-001]", "--max-restarts", "1")
    script = _script(capsys, *site, *more, "--dry-run", "--", "train")
    for line in ("ntasks-per-node=2", "cpus-per-task=8", "qos=debug", "mail-type=END"):
        assert f"#SBATCH --{line}\n" in script
    assert "qos=regular" not in script and "#SBATCH '--nodelist=nid[001-001]'\n" in script
    assert 'OMP_NUM_THREADS="4"' in script and "srun --mpi=pmi2" in script and '"$restarts" -ge 1 ]' in script


BAD = {
    "unknown site": (["submit", "--site", "lumig", "--nodes", "1"], ["unknown site 'lumig'", "did you mean 'lumi-g'", "generic"]),
    "no account": (["submit", "--site", "perlmutter", "--nodes", "1"], ["'perlmutter'", "--account"]),
    "no partition": (["submit", "--site", "./needy.toml", "--nodes", "1"], ["needy.toml", "--partition"]),
    "no such profile": (["submit", "--site", "./gone.toml", "--nodes", "1"], ["gone.toml", "No such file"]),
    "no nodes": (["submit", "--nodes", "0"], ["--nodes=0", ">= 1"]),
    "unknown ranks": (["submit", "--nodes", "1"], ["'generic'", "--ranks-per-node"]),
    "no ranks": ([*GENERIC[:3], "--ranks-per-node", "0"], ["--ranks-per-node=0"]),
    "bad time": ([*GENERIC, "--time", "2h"], ["--time '2h'", "1:30:00"]),
    "time too short": ([*GENERIC, "--time", "2"], ["--time 2 is 120 s", "--signal-lead"]),
    "bad nodelist": ([*GENERIC, "--nodelist", "n[1-"], ["--nodelist 'n[1-'", "does not parse", "n[1-4,07]"]),
    "too many nodes": ([*GENERIC, "--nodelist", "n[1-3]"], ["names 3 nodes", "--nodes is 2"]),
    "bad exclude": ([*GENERIC, "--exclude", "n]"], ["--exclude 'n]'", "does not parse"]),
    "bad array": ([*GENERIC, "--array", "0..4"], ["--array '0..4'", "0-4"]),
    "bad sweep": ([*GENERIC, "--sweep", "lr"], ["--sweep 'lr'", "lr=0.1,0.05"]),
    "launcher": ([*GENERIC, "--launcher", "mpirun"], ["unknown launcher 'mpirun'", "mpiexec"]),
    "setup": ([*GENERIC, "--setup", "gone.sh"], ["--setup gone.sh", "no such file"]),
    "no environment": ([*GENERIC, "--broadcast"], ["--broadcast", "neither", "--no-broadcast"]),
    "sbatch in short": ([*GENERIC, "--sbatch=-C gpu"], ["--sbatch '-C gpu'", "--sbatch=--comment="]),
    "sbatch of submit's own": ([*GENERIC, "--sbatch=--nodes=5"], ["--sbatch=--nodes=5", "submit sets that itself (--nodes)"]),
    "its beginning": ([*GENERIC, "--sbatch=--sig=USR1"], ["--sbatch=--sig=USR1", "submit sets that itself (--signal-lead)"]),
    "two lines": ([*GENERIC, "--sbatch=--comment=a\n#SBATCH --exclusive"], ["--sbatch ", "without control characters"]),
    "account of two lines": ([*GENERIC, "--account", "a\nb"], ["--account 'a\\nb'", "without control characters"]),
    "output of two lines": ([*GENERIC, "--output", "a\rb"], ["--output 'a\\rb'", "without control characters"]),
    "output not UTF-8": ([*GENERIC, "--output", "a\udcff"], ["--output 'a\\udcff'", "without control characters"]),
    "setup of the site": (["submit", "--site", "./broken.toml", "--nodes", "1"], ["broken.toml", "bash can't read the script"]),
    "two seeds": ([*GENERIC, "--array", "0-1", "--sweep", "seed=1,2"], ["--array and --sweep both set --seed"]),
}
BAD_PROGRAM = {
    "nothing": ([], ["nothing to run", "-- train"]),
    "unknown command": (["trian"], ["invalid choice: 'trian'"]),
    "no such script": (["gone.py"], ["gone.py: no such file"]),
    "bad flag of train": (["train", "--rule", "trendsmooth"], ["trendsmooth", "did you mean 'trend-smooth'"]),
    "unknown flag of train": (["train", "--epohcs", "3"], ["unrecognized arguments: --epohcs"]),
    "output": (["train", "--output", "x"], ["leave --output of train out"]),
    "resume": (["train", "--resume=auto"], ["leave --resume of train out"]),
    "host ranks": (["train", "--progress", "host-rank", "--host-ranks", "4"], ["host_ranks=4, but the nodes have [4, 4] ranks"]),
    "slow host rank": (["train", "--progress", "host-rank", "--slow", "6:2"], ["--slow 6:2"]),
    "groups": (["train", "--mode", "hierarchical", "--groups", "3"], ["groups=3: expected a multiple of the 2 nodes"]),
    "many groups": (["train", "--mode", "hierarchical", "--groups", "10"], ["groups=10: 5 per node, but a node has 4 rank(s)"]),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_PROGRAM])
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "needy.toml").write_text('description = "x"\ngpus_per_node = 1\nneeds = ["partition"]\n')
    (tmp_path / "broken.toml").write_text('description = "x"\ngpus_per_node = 1\nsetup = ["if true"]\n')
    if name == "no environment":
        monkeypatch.setattr("sys.prefix", str(tmp_path))
    words, parts = BAD[name] if name in BAD else ([*GENERIC, "--", *BAD_PROGRAM[name][0]], BAD_PROGRAM[name][1])
    words = [*words, "--", "train"] if name in BAD else words
    try:
        code = main(words)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("error:") == 1, err
    for part in parts:
        assert part in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.toml", "needy.toml"]


def test_a_value_of_a_sweep_is_checked_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERIC, "--sweep", "lr=0.1,-1", "--dry-run", "--", "train"]) == 2
    assert "lr=-1" in capsys.readouterr().err
    assert main([*GENERIC, "--sweep", "lr=0.1,1", "--dry-run", "--", "train", "--lr", "1"]) == 2
    assert "--lr is given twice" in capsys.readouterr().err


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")  # what mpiexec sets
    monkeypatch.setenv("PMI_RANK", "0")
    assert main([*GENERIC, "--dry-run", "--", "list"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "submit was started 4 times" in err


def test_words_for_sbatch_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert "#SBATCH '--comment=x y'\n" in _script(capsys, *GENERIC, "--sbatch=--comment=x y", "--dry-run", "--", "list")


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("sbatch") is None
    assert main([*GENERIC, "--output", "out", "--mpi", "", "--", "train"]) == 2
    err = capsys.readouterr().err
    assert "no sbatch on PATH" in err and "--dry-run" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_account_from_the_environment_will_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "m1_g")
    assert "--account" not in _script(capsys, "submit", "--site", "perlmutter", "--nodes", "1", "--dry-run", "--", "train")
