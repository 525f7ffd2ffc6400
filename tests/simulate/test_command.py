"""``hpcasync simulate`` through its console script, dry runs, and the prediction of a live run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcasync.cli import main
from hpcasync.simulate import make_simulate_config
from hpcasync.simulate.dry import dry_run
from hpcasync.train.config import read_config
from tests.mpi import MpiRun


def command(folder: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    # A folder whose mpi4py can't be imported: the simulator must not even try.
    (folder / "mpi4py").mkdir(exist_ok=True)
    (folder / "mpi4py" / "__init__.py").write_text("raise RuntimeError('the simulator imported mpi4py')")
    path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[2])])
    line = [sys.executable, "-m", "hpcasync", "simulate", *args]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stderr
    return done


def test_a_run_leaves_what_a_live_run_leaves(tmp_path: Path) -> None:
    args = "--workers 6 --rule trend-smooth --compute lognormal:1.0,0.3 --network 5us,10GB/s --slow 3:4.0 --fail 2@10"
    args += " --join 5@20 --partition shards:2 --epochs 2 --json"
    done = command(tmp_path, *args.split(), "--output", "run")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["workers"] == result["ranks"] == 6 and result["mode"] == "async"
    assert result["samples_per_second"] > 0 and result["virtual_seconds"] == result["seconds"] > 20
    assert set(result["staleness"]) == {"mean", "p50", "p95", "max"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert file["ranks/updates"][:].sum() == result["updates"]
        assert file["curves/seconds"][-1] == result["virtual_seconds"]
        assert file["ranks/staleness"].shape[0] == 6
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    again = command(tmp_path, "--config", "run/config.toml", "--output", "again", "--json")
    second = json.loads(again.stdout.splitlines()[-1])
    for key in ("test_loss", "train_loss", "virtual_seconds", "staleness", "updates"):
        assert second[key] == result[key]
    assert "Virtual workers" in done.stdout and "virtual seconds" in done.stdout


BAD = {
    "distribution": (["--compute", "lognormal:1.0"], ["--compute", "lognormal:MEAN,SIGMA"]),
    "network": (["--network", "fast"], ["--network", "LATENCY,BANDWIDTH"]),
    "service": (["--service", "1"], ["--service", "10GB/s"]),
    "slow": (["--slow", "9:2"], ["--slow 9:2", "no worker 9"]),
    "fail": (["--fail", "1"], ["--fail 1", "RANK@SECONDS"]),
    "join": (["--join", "1@x"], ["--join 1@x", "'x'"]),
    "no workers": (["--workers", "0"], ["--workers=0", ">= 1"]),
    "mode": (["--mode", "hierarchic"], ["did you mean 'hierarchical'"]),
    "groups": (["--mode", "hierarchical", "--groups", "5"], ["--groups=5", "4 workers"]),
    "delay": (["--mode", "hierarchical", "--every", "4", "--delay", "4"], ["delay=4", "fewer steps than every"]),
    "delay, inner state": (["--mode", "hierarchical", "--delay", "1", "--inner-state", "reset"], ["--inner-state reset"]),
    "groups of async": (["--groups", "2"], ["--groups", "hierarchical", "async"]),
    "every of async": (["--every", "2"], ["--every", "kstep, hierarchical"]),
    "free-running of sync": (["--mode", "sync", "--free-running"], ["--free-running", "async"]),
    "updates without dry": (["--updates", "100"], ["--updates", "--dry"]),
    "dry with failures": (["--dry", "--fail", "1@2"], ["--dry", "--fail"]),
    "dry with a delay": (["--dry", "--delay", "3"], ["--dry", "--delay"]),
    "like nothing": (["--like", "nowhere"], ["nowhere", "not a finished run"]),
    "like and compute": (["--like", "nowhere", "--compute", "constant:1"], ["--like", "--compute"]),
    "rule": (["--rule", "gsmg"], ["did you mean 'gsgm'"]),
    "lr": (["--lr", "0"], ["lr=0"]),
    "epochs": (["--epochs", "0"], ["--epochs=0"]),
    "data": (["--data", "digit"], ["did you mean 'digits'"]),
    "partition": (["--partition", "shards:99"], ["99"]),
    "more workers than samples": (["--workers", "99999999"], ["99999999", "at most 1438"]),
    "partition of too many": (["--workers", "99999999", "--partition", "shards:2"], ["99999999"]),
    "batch": (["--batch", "361"], ["batch 361", "share of each of 4", "360 of 1438"]),
    "batch of a part": (["--batch", "361", "--partition", "shards:5"], ["batch 361", "share of worker"]),
    "recorded nothing": (["--compute", "recorded:."], ["run.h5: not a finished run", "(No such file)", "give the folder"]),
    "verification": (["--guided", "--verification", "1439"], ["1439", "1438"]),
    "rho": (["--guided", "--rho", "1"], ["--rho=1", ">= 2"]),
    "window": (["--rule", "gsgm", "--window", "9"], ["window=9", "4"]),
    "every schedule": (["--mode", "kstep", "--every", "4:2:1"], ["4:2:1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv, parts = BAD[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            code: Any = main(["simulate", *argv])
        except SystemExit as stop:
            code = stop.code
    text = capsys.readouterr().err
    assert code == 2 and text.count("error:") == 1 and "Traceback" not in text
    for part in parts:
        assert part in text
    assert not list(tmp_path.glob("runs/*"))


def test_configuration_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('mode = "hierarchical"\ngroups = 3\nworkers = 6\nslow = ["1:2"]\nstaleness = 4\n')
    config = make_simulate_config(read_config(str(tmp_path / "a.toml")), {"every": 4})
    assert (config.groups, config.workers, config.slow, config.staleness, config.every) == (3, 6, ("1:2",), 4, 4)
    assert make_simulate_config(config.keys()) == config
    assert config.name.endswith("mlp-hierarchical-simulated")
    assert make_simulate_config({"mode": "kstep", "preset": "bmuf", "workers": 8}).block_momentum == 1 - 1 / 8


def test_dry_run_of_equal_workers() -> None:
    config = make_simulate_config({"dry": True, "workers": 10, "updates": 1000, "parameters": 1000, "network": "1s,inf"})
    found = dry_run(config)
    assert found["virtual_seconds"] == 100 * 3
    assert found["pushes_per_worker"] == {"min": 100, "max": 100}
    # A worker's first push has seen none of those before it in the round.
    assert found["staleness"]["max"] == 9 and found["staleness"]["mean"] == pytest.approx(9, abs=0.1)
    assert found["queue_seconds"]["max"] == 0


def test_dry_run_queues_and_waits() -> None:
    keys = {"dry": True, "workers": 20, "updates": 2000, "parameters": 1024, "compute": "constant:0"}
    queued = dry_run(make_simulate_config({**keys, "service": "4096B/s"}))
    assert queued["updates_per_second"] == pytest.approx(1, rel=0.02)
    assert queued["queue_seconds"]["max"] == pytest.approx(19, rel=0.02) and queued["store_busy"] > 0.98
    keys |= {"compute": "constant:1.0"}
    bound = dry_run(make_simulate_config({**keys, "staleness": 3, "slow": ("0:10",)}))
    free = dry_run(make_simulate_config({**keys, "slow": ("0:10",)}))
    assert bound["waited_share"] > 0.7 and free["waited_share"] == 0
    pushes = bound["pushes_per_worker"]
    assert pushes["max"] - pushes["min"] <= 4 < free["pushes_per_worker"]["max"] - free["pushes_per_worker"]["min"]


def test_dry_run_repeats_for_a_seed() -> None:
    keys = {"dry": True, "workers": 50, "updates": 5000, "parameters": 10, "compute": "exponential:1.0"}
    found = [dry_run(make_simulate_config({**keys, "seed": s})) for s in (0, 0, 1)]
    for one in found:
        one.pop("wall_seconds")
    assert found[0] == found[1] != found[2]


def test_ten_thousand_workers_make_a_million_updates_in_a_minute() -> None:
    keys = {"dry": True, "workers": 10_000, "updates": 1_000_000, "parameters": 10**6, "compute": "lognormal:1.0,0.3"}
    found = dry_run(make_simulate_config({**keys, "network": "5us,10GB/s"}))
    assert found["wall_seconds"] < 60
    assert found["staleness"]["mean"] == pytest.approx(10_000, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_predicts_a_live_run_of_two_ranks(mpirun: MpiRun) -> None:
    """From its own numbers; how well is what ``benchmarks/convergence/live.py`` measures, here the margin is wide."""
    args = ["train", "--model", "mlp", "--epochs", "20", "--batch", "16", "--rule", "asgd", "--output", "live", "--json"]
    live = json.loads(mpirun.cli(args, 2).stdout.splitlines()[-1])
    main(["simulate", *args[1:-3], "--like", str(mpirun.folder / "live"), "--output", str(mpirun.folder / "simulated")])
    found = json.loads((mpirun.folder / "simulated" / "result.json").read_text())
    print(live["samples_per_second"], found["samples_per_second"], live["staleness"], found["staleness"])
    assert found["workers"] == 2
    assert found["samples_per_second"] == pytest.approx(live["samples_per_second"], rel=0.5)
    assert found["staleness"]["mean"] == pytest.approx(live["staleness"]["mean"], rel=0.5)
    assert set(live) - set(found) == {"resumed_from", "restarts"}
    assert np.isfinite(found["test_loss"])
