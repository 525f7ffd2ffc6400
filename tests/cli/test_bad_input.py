"""Bad input on the command line: one clear error, exit code 2, on one and on several ranks, never a hang."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli.cases import run_cases
from tests.mpi import REPO, MpiRun


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files with something wrong."""
    from hpcasync.data import Arrays, write_dataset

    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.h5").write_text("this is not HDF5")
    x, y = np.zeros((2, 4), np.float32), np.array([0, 1])
    write_dataset(folder / "tiny.h5", Arrays(x, y, x, y))
    whole = (folder / "tiny.h5").read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "taken").write_text("a file where a folder should be")
    (folder / "broken.toml").write_text("epochs = = 3")
    (folder / "keys.toml").write_text("epohcs = 3")
    (folder / "type.toml").write_text('epochs = "three"')
    (folder / "table.toml").write_text("[train]\nepochs = 3")
    (folder / "nan.csv").write_text("a,b,label\n1,2,0\nnan,3,1\n")
    (folder / "frozen.py").write_text(
        "import torch\n"
        "def frozen(shape, classes):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))"
        ".requires_grad_(False)\n"
        "def half(shape, classes):\n"
        "    return Half(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)).to(torch.float16))\n"
        "def wide(shape, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, classes))\n"
        "class Half(torch.nn.Module):\n"
        "    def __init__(self, net):\n        super().__init__(); self.net = net\n"
        "    def forward(self, x):\n        return self.net(x.half()).float()\n"
    )
    return folder


CASES = {
    "unknown rule": (["train", "--rule", "trendsmooth"], ["trendsmooth", "did you mean 'trend-smooth'"]),
    "unknown mode": (["train", "--mode", "asynch"], ["'asynch'", "did you mean 'async'"]),
    "unknown model": (["train", "--model", "lenett"], ["'lenett'", "did you mean 'lenet"]),
    "unknown data": (["train", "--data", "digit"], ["'digit'", "did you mean 'digits'"]),
    "unknown base": (["train", "--base", "momentun"], ["'momentun'", "did you mean 'momentum'"]),
    "unknown variant": (["train", "--variant", "oposed"], ["'oposed'", "did you mean 'opposed'"]),
    "unknown schedule": (["train", "--schedule", "cosin"], ["did you mean 'cosine'"]),
    "unknown flag": (["train", "--nope"], ["--nope"]),
    "not a number": (["train", "--epochs", "x"], ["--epochs", "'x'"]),
    "missing file": (["train", "--data", "gone.h5"], ["gone.h5", "not found"]),
    "not HDF5": (["train", "--data", "{files}/text.h5"], ["text.h5", "HDF5"]),
    "truncated": (["train", "--data", "{files}/cut.h5"], ["cut.h5"]),
    "fewer samples than ranks": (["train", "--data", "{files}/tiny.h5"], ["2", "ranks"]),
    "negative lr": (["train", "--lr", "-0.1"], ["lr=-0.1", "(0, inf"]),
    "zero lr": (["train", "--lr", "0"], ["lr=0"]),
    "lr not finite": (["train", "--lr", "nan"], ["lr=nan"]),
    "momentum of 1": (["train", "--momentum", "1"], ["momentum=1", "[0, 1)"]),
    "beta of 1": (["train", "--beta", "1.0"], ["beta=1.0", "[0, 1)"]),
    "betas": (["train", "--base", "adam", "--betas", "0.9", "1.5"], ["betas[1]=1.5"]),
    "floor above 1": (["train", "--floor", "1.5"], ["floor=1.5"]),
    "shrink word": (["train", "--variant", "opposed", "--shrink", "often"], ["'often'", "staleness"]),
    "K of 0": (["train", "--mode", "kstep", "--every", "0"], ["--every=0", ">= 1"]),
    "block momentum of 1": (["train", "--mode", "kstep", "--block-momentum", "1"], ["block_momentum=1"]),
    "block lr of 0": (["train", "--mode", "kstep", "--block-lr", "0"], ["block_lr=0"]),
    "inner state": (["train", "--mode", "kstep", "--inner-state", "averge"], ["did you mean 'average'"]),
    "negative staleness": (["train", "--staleness", "-1"], ["--staleness=-1", ">= 0"]),
    "no epochs": (["train", "--epochs", "0"], ["--epochs=0", ">= 1"]),
    "no batch": (["train", "--batch", "0"], ["--batch=0", ">= 1"]),
    "no threads": (["train", "--threads", "0"], ["--threads=0"]),
    "on-nonfinite": (["train", "--on-nonfinite", "skipp"], ["did you mean 'skip'"]),
    "device": (["train", "--device", "tpu9000"], ["tpu9000", "cpu"]),
    "flag of another mode": (["train", "--every", "4"], ["--every", "kstep", "async"]),
    "option of another rule": (["train", "--rule", "asgd", "--floor", "0.1"], ["'asgd'", "'floor'"]),
    "option of another base": (["train", "--rule", "asgd", "--momentum", "0.5"], ["momentum=0.5", "'sgd'", "nesterov"]),
    "base of another rule": (["train", "--rule", "apam", "--base", "adam"], ["'apam' has base amsgrad", "'adam'"]),
    "window beyond the ranks": (["train", "--rule", "gsgm", "--window", "4"], ["window=4", "number of workers"]),
    "rule of another mode": (["train", "--mode", "sync", "--rule", "easgd"], ["'easgd'", "mode async"]),
    "box upside down": (["train", "--rule", "apam", "--low", "1", "--high", "-1"], ["low=1.0", "high=-1.0"]),
    "no patience": (["train", "--rule", "gsgm", "--patience", "0"], ["patience=0"]),
    "no period": (["train", "--rule", "easgd", "--period", "0"], ["period=0", ">= 1"]),
    "negative compensation": (["train", "--rule", "dc-asgd", "--compensation", "-1"], ["compensation=-1"]),
    "no trainable parameter": (["train", "--model", "frozen:frozen"], ["no trainable parameter"]),
    "output is a file": (["train", "--output", "{files}/taken"], ["taken", "not writable", "--output"]),
    "output below a file": (["train", "--output", "{files}/taken/run"], ["taken/run", "not writable"]),
    "config missing": (["train", "--config", "{files}/gone.toml"], ["gone.toml"]),
    "config not TOML": (["train", "--config", "{files}/broken.toml"], ["broken.toml", "not TOML"]),
    "config unknown key": (["train", "--config", "{files}/keys.toml"], ["'epohcs'", "did you mean 'epochs'"]),
    "config wrong type": (["train", "--config", "{files}/type.toml"], ["--epochs='three'", "whole number"]),
    "config table": (["train", "--config", "{files}/table.toml"], ["[train]", "table"]),
    "float16 parameters": (["train", "--model", "frozen:half"], ["net.1.weight is float16", "float32"]),
    "slow rank that is not there": (["train", "--slow", "3:2"], ["--slow 3:2", "no worker 3"]),
    "slow without a factor": (["train", "--slow", "0"], ["--slow 0", "RANK:FACTOR"]),
    "quick rank": (["train", "--slow", "0:0.5"], ["--slow 0:0.5", "slower"]),
    "shapes": (["train", "--model", "frozen:wide"], ["(1, 8, 8)", "784"]),
}


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_case_says_what_is_wrong_once_and_returns_2(mpirun: MpiRun, files: Path, ranks: int) -> None:
    if ranks == 1 and mpirun.lane.name != "mpich":
        pytest.skip("one rank: the same on every MPI")
    names = [n for n in CASES if not (n == "fewer samples than ranks" and ranks == 1)]
    cases = [[part.replace("{files}", str(files)) for part in CASES[name][0]] for name in names]
    everyone = run_cases(mpirun, cases, ranks, env={"PYTHONPATH": f"{files}:{REPO}"})
    for i, name in enumerate(names):
        code, text, _ = everyone[0][i]
        assert code == 2, (name, code, text)
        assert "Traceback" not in text
        assert text.count("error:") == 1, (name, text)
        for part in CASES[name][1]:
            assert part in text, (name, part, text)
        for rank in range(1, ranks):
            assert everyone[rank][i][0] == 2, (name, rank)
    assert not list(mpirun.folder.glob("runs/*/result.json"))


def test_the_console_script_exits_with_2_under_mpiexec(mpirun: MpiRun) -> None:
    done = mpirun.cli(["train", "--data", "nowhere.h5"], 3, check=False)
    assert done.returncode == 2
    assert done.stderr.count("hpcasync: error:") == 1
    assert "nowhere.h5" in done.stderr


def test_bad_input_on_one_rank_only_ends_the_job(mpirun: MpiRun) -> None:
    code = """
    import sys
    from hpcasync import init
    from hpcasync.cli import main
    world = init()
    if world.rank == 1:
        sys.exit(main(["train", "--epochs", "0"]))
    world.collectives.barrier()
    """
    done = mpirun(code, 3, check=False)
    assert done.returncode != 0
    assert "rank 1: hpcasync: error: --epochs=0" in done.stderr


def test_ranks_with_different_options_are_named(mpirun: MpiRun) -> None:
    code = """
    import sys
    from hpcasync import init
    from hpcasync.cli import main
    sys.exit(main(["train", "--epochs", "1", "--seed", str(init().rank // 2)]))
    """
    done = mpirun(code, 3, check=False)
    assert done.returncode == 2
    assert "ranks disagree on --seed: rank 0 has 0, rank 2 has 1" in done.stderr
    assert "rank 2 differs" in done.stderr


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_full_disk_leaves_no_half_file(mpirun: MpiRun) -> None:
    code = """
    import resource, sys
    from hpcasync.cli import main
    import hpcasync.train.records as records
    start = records.RunFolder.finish
    def finish(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # EFBIG from here on
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        start(*args)
    records.RunFolder.finish = finish
    sys.exit(main(["train", "--epochs", "1", "--output", "run"]))
    """
    done = mpirun(code, 2, check=False, timeout=250)
    assert done.returncode == 2
    assert "run.h5" in done.stderr and "Traceback" not in done.stderr and "file-size limit" in done.stderr
    assert sorted(p.name for p in (mpirun.folder / "run").iterdir()) == [
        "checkpoint-000001.h5", "config.toml", "metrics.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_data_commands(mpirun: MpiRun, files: Path) -> None:
    cases = (
        (["data", "info", "nothing"], "'nothing'"),
        (["data", "info", files / "text.h5"], "text.h5"),
        (["data", "fetch", "imagenet"], "'imagenet'"),
        (["data", "import", files / "nan.csv", "--out", "x.h5"], "nan.csv"),
        (["data", "import", files / "gone.csv", "--out", "x.h5"], "gone.csv"),
    )
    (found,) = run_cases(mpirun, [argv for argv, _ in cases], None)
    for (argv, part), (code, text, _) in zip(cases, found, strict=True):
        assert code == 2, argv
        assert part in text and "Traceback" not in text
    assert not (mpirun.folder / "x.h5").exists()


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_low_thread_level_is_refused(mpirun: MpiRun, ranks: int) -> None:
    """Collectives during backward and the progress thread call MPI from several threads."""
    code = """
        import mpi4py, sys
        mpi4py.rc.thread_level = "serialized"
        from hpcasync.cli import main
        sys.exit(main(["train", "--model", "logistic", "--epochs", "1", "--mode", "sync"]))
        """
    done = mpirun(code, ranks, check=False)
    assert done.returncode == 2, done.stderr
    assert "MPI_THREAD_MULTIPLE" in done.stderr and "mpi4py.rc.thread_level" in done.stderr and "Traceback" not in done.stderr
