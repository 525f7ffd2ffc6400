"""`hpcasync train` itself on a real Slurm: stopped and resumed to the same bits, an array of seeds, started wrongly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import differences
from tests.mpi import Lane
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Submit, Submitted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # torch is imported up to six times in a test

ONE = ("--cpus-per-rank", 1)  # one thread each: all the nodes share this machine's cores
TRAIN = ("--", "train", "--data", "digits", "--model", "mlp")
SAME = ("test_loss", "test_accuracy", "train_loss", "updates", "ranks", "nodes", "epochs")


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


NET = """
import os, time
import torch
from hpcasync.train import signals

def net(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.BatchNorm1d(24),
        torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(24, classes))

def held(shape, classes):
    # The same, which in a job's first start stays at the 30th step until there is a signal.
    model, seen = net(shape, classes), 0

    def wait(module, inputs):
        nonlocal seen
        seen += module.training
        time.sleep(0.1)  # ranks in step ask for signals at each of such slow steps
        while seen > 30 and not signals.received():
            time.sleep(0.02)

    if "SLURM_RESTART_COUNT" not in os.environ:
        model.register_forward_pre_hook(wait)
    return model
"""
MODES = {
    "sync": ("--mode", "sync", "--base", "adam", "--lr", 0.001, "--schedule", "cosine"),
    "kstep": ("--mode", "kstep", "--every", 4, "--block-momentum", 0.5, "--base", "momentum", "--lr", 0.02),
}
# Both runs as they are without any signal, in one job.
WHOLE = """
import json, sys
from hpcasync.cli import main
sys.exit(any([main([*words, "--output", name]) for name, words in json.loads(sys.argv[1]).items()]))
"""


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # signals of both libraries: test_jobs.py
def test_stopped_jobs_come_to_the_same_parameters(submit: Submit, slurm: Cluster, lane: Lane) -> None:
    """`hpcasync train` on two nodes, once at its time limit, once preempted: requeued, resumed, bit for bit as if left alone."""
    (submit.folder / "net.py").write_text(NET)
    (submit.folder / "whole.py").write_text(WHOLE)
    where = ("--nodes", 2, "--ranks-per-node", 1, *ONE)
    train = ("train", "--epochs", 3, "--seed", 3, "--model")
    # Slurm looks at time limits every 30 s and signals up to a minute early.
    kstep = submit(*where, "--time", 10, "--signal-lead", 100, "--", *train, "net:held", *MODES["kstep"], lane=lane)
    sync = submit(*where, "--", *train, "net:held", *MODES["sync"], lane=lane)
    words = {mode: [*map(str, (*train, "net:net", *flags))] for mode, flags in MODES.items()}
    whole = submit(*where, "--", submit.folder / "whole.py", json.dumps(words), lane=lane)
    for job in (kstep, sync):
        metrics = job.folder / "metrics.jsonl"
        slurm.until(lambda metrics=metrics: metrics.exists() and metrics.read_text(), "epoch", 240, job.output)  # type: ignore[misc]

    _limit(slurm, kstep, minutes_left=1)
    kstep.wait_for("to be requeued, restart 1 of at most 20")
    _limit(slurm, kstep, minutes_left=10)  # of the next start
    assert whole.wait() == "COMPLETED", whole.output()
    slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    sync.wait_for("to be requeued, restart 1 of at most 20")
    for job, mode in ((kstep, "kstep"), (sync, "sync")):
        assert job.wait() == "COMPLETED", job.output()
        out = job.output()
        assert "got USR1, asking the ranks for a checkpoint" in out and "stopped by SIGUSR1" in out
        assert re.search(r"resumed from \S+: epoch 2, step ([1-9]|1\d|2[0-2])\b", out), out  # of 23
        expected = submit.folder / mode
        assert differences(job.folder, expected) == []
        assert {k: _result(job.folder)[k] for k in SAME} == {k: _result(expected)[k] for k in SAME}
        rows = [json.loads(line)["epoch"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert rows == [1, 2, 3]
        assert _result(job.folder)["restarts"] > 0 == _result(expected)["restarts"]


def _limit(slurm: Cluster, job: Submitted, minutes_left: int) -> None:
    """Change a job's time limit to one that comes one to two minutes later than so many from now."""
    state = job.facts
    hours, minutes, _ = map(int, state["RunTime"].rsplit("-")[-1].split(":")) if state["JobState"] == "RUNNING" else (0, 0, 0)
    slurm.run(["scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 1 + minutes_left}"])


def test_an_array_trains_one_seed_per_element(submit: Submit) -> None:
    job = submit("--nodes", 1, "--ranks-per-node", 1, "--array", "1,4", *ONE, *TRAIN, "--mode", "kstep", "--epochs", 1)
    job.slurm.until(lambda: not job.slurm.run(["squeue", "-h", "-j", str(job.number)], check=False).stdout, "end", 240)
    results = {seed: _result(job.folder / str(seed)) for seed in (1, 4)}
    assert [results[seed]["seed"] for seed in (1, 4)] == [1, 4]
    assert results[1]["test_loss"] != results[4]["test_loss"]


def test_a_wrong_process_manager_is_refused(submit: Submit, slurm: Cluster) -> None:
    """`--mpi=none` starts two trainings of one rank each, which would both write to the same folder."""
    job = submit("--nodes", 1, "--ranks-per-node", 2, "--mpi", "none", *TRAIN)
    assert job.wait() == "FAILED", job.output()
    assert job.facts["ExitCode"] == "2:0"
    assert job.output().count("hpcasync: error: srun started 2 tasks, but MPI sees a world of size 1") == 1
    assert "srun --mpi=pmi2" in job.output()
    assert not (job.folder / "metrics.jsonl").exists()

    done = submit.command("--nodes", 1, "--ranks-per-node", 2, "--mpi", "pmi3", "--output", "x", *TRAIN)
    assert done.returncode == 2 and "unknown --mpi 'pmi3'" in done.stderr and ", pmi2, " in done.stderr
    assert not (submit.folder / "x").exists()


def test_the_doctor_sees_what_a_job_gets(submit: Submit) -> None:
    job = submit("--nodes", 2, "--ranks-per-node", 1, *ONE, "--", "doctor", "--json")
    assert job.wait() == "COMPLETED", job.output()
    (text,) = [line for line in job.output().splitlines() if line.startswith("{")]
    lines = {line["check"]: line for line in json.loads(text)["lines"]}
    assert lines["launcher"]["status"] == "ok"
    assert lines["node map"]["status"] == "ok" and "(n1: 1, n2: 1)" in lines["node map"]["found"]
    assert lines["lost updates"]["status"] == "ok"


def test_scaling_is_one_job_per_number_of_nodes(submit: Submit, tmp_path: Path) -> None:
    words = ("--", "bench", "scaling", "--out", tmp_path, "--model", "logistic", "--seconds", "0.2", "--rounds", "1")
    for nodes in (1, 2):
        job = submit("--nodes", nodes, "--ranks-per-node", 1, *ONE, *words, "--kinds", "weak", "--what", "sync", "async:asgd")
        assert job.wait() == "COMPLETED", job.output()
    rows = [row for path in tmp_path.glob("ranks-*.json") for row in json.loads(path.read_text())["rows"]]
    assert sorted((row["what"], row["ranks"], row["nodes"]) for row in rows) == [
        ("async:asgd", 1, 1), ("async:asgd", 2, 2), ("sync", 1, 1), ("sync", 2, 2), ("torch", 1, 1),
    ]  # fmt: skip
