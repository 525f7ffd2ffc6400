"""``--resume`` with something wrong: one clear error, exit code 2, on one and on several ranks, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.mpi import MpiRun

PROGRAM = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from hpcasync import init
from hpcasync.cli import main
from hpcasync.train import checkpoint_file
from hpcasync.train.lock import RunLock

world = init()
RUN = ["train", "--mode", "sync", "--epochs", "2", "--checkpoint-every", "30"]

def said(argv):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    return [code, out.getvalue()]

assert main([*RUN, "--output", "run"]) == 0
if world.rank == 0:
    import numpy as np
    from hpcasync.data import Arrays, open_dataset, write_dataset
    digits = open_dataset("digits")
    arrays = {k: np.array(digits.array(k)) for k in ("train/x", "train/y", "test/x", "test/y")}
    arrays["train/y"][0] = 9 - arrays["train/y"][0]
    write_dataset(Path("other.h5"), Arrays(*arrays.values()))
    for name in ("cut", "newer", "locked", "fallback"):
        shutil.copytree("run", name)
    for path in Path("cut").glob("checkpoint-*.h5"):
        os.truncate(path, 5000)
    os.truncate(sorted(Path("fallback").glob("checkpoint-*.h5"))[-1], 5000)
    with open(sorted(Path("newer").glob("checkpoint-*.h5"))[-1], "rb+", buffering=0) as raw:
        checkpoint_file._seal(raw, version=7)
    os.mkdir("empty")
    lock = RunLock(Path("locked"))
world.collectives.barrier()
found = {}
for name, argv in json.load(open(sys.argv[1])).items():
    found[name] = said([*RUN, *argv])
    world.collectives.barrier()
everyone = world.gather(found)
if world.rank == 0:
    lock.release()
    print(json.dumps(everyone))
"""

pytestmark = pytest.mark.timeout(400)  # several launches each

CASES = {
    "no resume": (["--output", "run"], ["holds a run already", "--resume auto"]),
    "another folder's": (["--output", "run", "--resume", "cut"], ["holds a run already"]),
    "auto without a folder": (["--resume", "auto"], ["--output"]),
    "gone": (["--resume", "gone.h5"], ["gone.h5", "No such file"]),
    "none there": (["--resume", "empty"], ["empty", "no checkpoint"]),
    "no checkpoint": (["--resume", "other.h5"], ["other.h5", "does not begin"]),
    "all cut": (["--output", "cut", "--resume", "auto"], ["no checkpoint in cut is whole", "truncated", "Remove them"]),
    "newer format": (["--output", "newer", "--resume", "auto"], ["has format 7", "update hpcasync"]),
    "other model": (["--output", "run", "--resume", "auto", "--model", "logistic"], ["another model", "float32 (", "missing"]),
    "other mode": (["--output", "run", "--resume", "auto", "--mode", "kstep"], ["--mode sync", "--mode kstep"]),
    "other base": (["--output", "run", "--resume", "auto", "--base", "adam"], ["--base sgd", "--base adam"]),
    "other seed": (["--output", "run", "--resume", "auto", "--seed", "4"], ["--seed 0", "--seed 4"]),
    "other data": (["--output", "run", "--resume", "auto", "--data", "other.h5"], ["other data", "checksum"]),
    "fewer epochs": (["--output", "run", "--resume", "auto", "--epochs", "1"], ["after 2 epochs", "--epochs is 1"]),
    "at work": (["--output", "locked", "--resume", "auto"], ["a run is at work in locked", "process"]),
    "keep none": (["--keep", "0"], ["--keep=0", ">= 1"]),
    "negative": (["--checkpoint-every", "-1"], ["--checkpoint-every=-1"]),
}


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_case_says_what_is_wrong_once_and_returns_2(mpirun: MpiRun, ranks: int) -> None:
    if ranks == 1 and mpirun.lane.name != "mpich":
        pytest.skip("one rank: the same on every MPI")
    cases = {name: argv for name, (argv, _) in CASES.items()}
    cases["fallback"] = ["--output", "fallback", "--resume", "auto"]
    (mpirun.folder / "cases.json").write_text(json.dumps(cases))
    done = mpirun(PROGRAM, ranks, args=["cases.json"], timeout=250)
    everyone = json.loads(done.stdout.splitlines()[-1])
    code, text = everyone[0].pop("fallback")
    assert code == 0 and text.count("warning:") == 1 and "Going on from fallback/checkpoint-" in text
    for name, (_, parts) in CASES.items():
        code, text = everyone[0][name]
        assert code == 2, (name, code, text)
        assert text.count("error:") == 1 and "Traceback" not in text, (name, text)
        for part in parts:
            assert part in text, (name, part, text)
        for rank in range(1, ranks):
            assert everyone[rank][name][0] == 2, (name, rank)
    before = json.loads((mpirun.folder / "run" / "result.json").read_text())
    assert before["restarts"] == 0 and (mpirun.folder / "run" / "config.toml").read_text().count('mode = "sync"') == 1


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(mpirun: MpiRun) -> None:
    disk = mpirun.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        args = ["train", "--mode", "sync", "--epochs", "5", "--keep", "4", "--json", "--output", "disk/run"]
        done = mpirun.cli(args, 2, timeout=250)
        assert done.stderr.count("disk is full") == 1 and "The run goes on" in done.stderr
        kept = sorted(p.name for p in (disk / "run").glob("checkpoint-*"))
        assert kept == ["checkpoint-000001.h5", "checkpoint-000002.h5"]
        assert not list((disk / "run").glob(".*"))
        again = mpirun.cli([*args, "--resume", "auto"], 2, timeout=250)
        assert "resumed from disk/run/checkpoint-000002.h5: epoch 3, step 0" in again.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


# Open MPI starts no process by itself from inside another job.
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_launched_twice_at_the_same_time(mpirun: MpiRun) -> None:
    code = """
    import subprocess, sys
    from hpcasync import init
    from hpcasync.cli import main
    from hpcasync.train.run import Run
    world, begin = init(), Run.epochs
    def epochs(self, keeper):
        if world.rank == 0:
            argv = ["train", "--epochs", "1", "--output", "run", "--resume", "auto"]
            env = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
            second = subprocess.run([sys.executable, "-m", "hpcasync", *argv], capture_output=True, text=True, env=env)
            print("SECOND", second.returncode, second.stderr.strip().splitlines()[-1:])
        return begin(self, keeper)
    Run.epochs = epochs
    sys.exit(main(["train", "--epochs", "1", "--output", "run"]))
    """
    done = mpirun(code, 2, timeout=250)
    assert "SECOND 2" in done.stdout and "a run is at work in run" in done.stdout
    assert (Path(mpirun.folder) / "run" / "result.json").exists()
