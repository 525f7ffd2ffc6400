"""``hpcasync train --partition`` under real mpiexec."""

from __future__ import annotations

import json

import pytest

from tests.mpi import MpiRun


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_ranks_train_on_their_own_classes(mpirun: MpiRun, mode: str) -> None:
    args = ["train", "--mode", mode, "--partition", "shards:5", "--epochs", "3", "--batch", "16", "--json"]
    done = mpirun.cli([*args, "--output", "run"], 2)
    result = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    assert result["test_accuracy"] > 0.4
    assert result["updates"] == 3 * 45 * (2 if mode == "async" else 1)  # ceil(719 / 16) batches on each rank
    assert 'partition = "shards:5"' in (mpirun.folder / "run" / "config.toml").read_text()


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "shards:2"], "see 4 of the 10 classes"),
        (["--partition", "dirichlet:0"], "ALPHA > 0"),
        (["--partition", "shards:5", "--batch", "900"], "batch 900 is larger than the share"),
        (["--batch", "720"], "batch 720 is larger than the share of each of 2 rank(s), 719 of 1438 samples"),
    ],
)
def test_bad_partition(mpirun: MpiRun, arguments: list[str], words: str) -> None:
    done = mpirun.cli(["train", *arguments], 2, check=False)
    assert done.returncode == 2
    assert done.stderr.count("hpcasync: error:") == 1 and words in done.stderr
