"""`hpcasync train` itself on a real Slurm: an array of seeds, preempted and resumed to the same bits, started wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # torch is imported up to six times in a test

ONE = ("--cpus-per-rank", 1)  # one thread each: all the nodes share this machine's cores
TRAIN = ("--", "train", "--data", "digits", "--model", "mlp")


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def test_a_preempted_job_comes_to_the_same_result(submit: Submit, slurm: Cluster) -> None:
    """Two nodes, preempted by a higher partition in the middle; against the same job left alone."""
    flags = ("--nodes", 2, "--ranks-per-node", 1, *ONE, *TRAIN, "--mode", "sync", "--epochs", 20, "--base", "adam", "--lr", 0.001)
    job = submit(*flags)
    metrics = job.folder / "metrics.jsonl"
    slurm.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, "epochs", 120, job.output)
    slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.wait() == "COMPLETED", job.output()
    assert job.facts["Restarts"] == "1" and "requeued, restart 1" in job.output()

    alone = submit(*flags)
    assert alone.wait() == "COMPLETED", alone.output()
    went_on, expected = _result(job.folder), _result(alone.folder)
    same = ("test_loss", "test_accuracy", "train_loss", "updates", "ranks", "nodes", "epochs")
    assert {k: went_on[k] for k in same} == {k: expected[k] for k in same}
    assert went_on["nodes"] == 2 and went_on["updates"] > 0
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == list(range(1, 21))


def test_an_array_trains_one_seed_per_element(submit: Submit) -> None:
    job = submit("--nodes", 1, "--ranks-per-node", 1, "--array", "1,4", *ONE, *TRAIN, "--mode", "kstep", "--epochs", 1)
    job.slurm.until(lambda: not job.slurm.run(["squeue", "-h", "-j", str(job.number)], check=False).stdout, "end", 120)
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
