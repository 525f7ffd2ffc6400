"""The fixture itself: separate hosts, GPUs of their own, and nothing left behind, not even of a job that ignores signals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import hosts
from tests.slurm import cluster
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import require


def test_tasks_of_two_nodes_have_names_places_and_gpus(slurm: Cluster) -> None:
    command = "echo $SLURM_PROCID $SLURM_LOCALID $(hostname) $CUDA_VISIBLE_DEVICES"
    out = slurm.run(["srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", "bash", "-c", command]).stdout
    assert sorted(out.splitlines()) == ["0 0 n1 0", "1 1 n1 1", "2 0 n2 0", "3 1 n2 1"]


def test_nothing_stays(tmp_path: Path) -> None:
    """Two clusters at a time, one of them with a job that ignores SIGTERM, beside the session's own."""
    reason = cluster.missing() or hosts.missing()
    if reason is not None:
        require(reason)
    with hosts.Hosts(1) as one, hosts.Hosts(1) as other, Cluster(one) as a, Cluster(other) as b:
        job = a.sbatch(f"--output={tmp_path}/out", "--wrap", "trap '' TERM; echo began; while :; do sleep 0.2; done")
        a.until(lambda: (tmp_path / "out").exists() and "began" in (tmp_path / "out").read_text(), "began")
        assert b.run(["squeue", "-h"]).stdout == "" and a.job(job)["JobState"] == "RUNNING"
        assert len(a.processes()) >= 5 and not set(a.processes()) & set(b.processes())
    for each in (a, b):
        assert each.processes() == [] and not each.folder.exists()


def test_what_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cluster.missing() or hosts.missing()
    if reason is not None:
        require(reason)
    monkeypatch.setattr(cluster, "_CONF", "ClusterName=test\nNoSuchKey=1\n")
    with hosts.Hosts(1) as one, pytest.raises((TimeoutError, RuntimeError)) as error, Cluster(one):
        pass
    assert "NoSuchKey" in str(error.value)
