"""Records, progress lines, plots and the evaluation, in one process."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcasync.comm import World
from hpcasync.data import open_dataset
from hpcasync.errors import UsageError
from hpcasync.train import make_config
from hpcasync.train.evaluate import evaluate
from hpcasync.train.plot import plot_curves, read_curves
from hpcasync.train.progress import Progress
from hpcasync.train.records import RunFolder, read_ranks

ROW = {"epoch": 1.0, "updates": 10.0, "seconds": 0.5, "train_loss": 2.0, "test_loss": 1.5, "test_accuracy": 0.5}


def rank(counts: list[int]) -> dict[str, Any]:
    """A rank's record."""
    numbers = {"seconds": 2.0, "compute": 1.0, "communicate": 0.75, "wait": 0.25, "samples": 8, "updates": 4, "skipped": 1}
    return {**numbers, "staleness": np.array(counts)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two ranks."""
    config = make_config({"output": str(tmp_path / "run")})
    folder = RunFolder(config)
    folder.add(ROW)
    folder.add({**ROW, "epoch": 2.0, "test_accuracy": 0.75})
    folder.finish({"test_accuracy": 0.75}, [rank([3, 1]), rank([1, 0, 0, 3])], config, World())
    return folder.path


def test_what_is_recorded_reads_back(run: Path) -> None:
    assert json.loads((run / "result.json").read_text()) == {"test_accuracy": 0.75}
    curves = read_curves(run)
    assert curves["epoch"].tolist() == [1, 2] and curves["test_accuracy"].tolist() == [0.5, 0.75]
    first, second = read_ranks(run)
    assert first["staleness"].tolist() == [3, 1, 0, 0] and second["staleness"].tolist() == [1, 0, 0, 3]
    assert first["share"] == {"compute": 0.5, "communicate": 0.375, "wait": 0.125}
    assert sorted(p.name for p in run.iterdir()) == ["config.toml", "metrics.jsonl", "result.json", "run.h5"]


def test_a_folder_with_a_run_is_not_overwritten(run: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        RunFolder(make_config({"output": str(run)}))


def test_a_full_disk_at_the_start_leaves_the_folder_free(tmp_path: Path) -> None:
    config = make_config({"output": str(tmp_path / "run"), "name": "x" * 10_000})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # room for the lock, not for the configuration
    try:
        with pytest.raises(UsageError, match=r"config\.toml: the file-size limit"):
            RunFolder(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_name_taken_in_the_same_second_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260102-030405")
    names = [RunFolder(make_config({})).path.name for _ in range(2)]
    assert names == ["20260102-030405-digits-mlp-async", "20260102-030405-digits-mlp-async-2"]


def test_no_run_there(tmp_path: Path) -> None:
    for read in (read_curves, read_ranks):
        with pytest.raises(UsageError, match="not a finished run"):
            read(tmp_path)


def test_plot_is_a_png(run: Path, tmp_path: Path) -> None:
    out = plot_curves([("one", run), ("again", run)], tmp_path / "x.png")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_progress_without_a_terminal_is_plain_and_on_one_rank_only() -> None:
    out, silent = io.StringIO(), io.StringIO()
    for shown, stream in ((True, out), (False, silent)):
        with Progress(2, 5, shown=shown, stream=stream) as progress:
            progress.step(1, 1, 0.5)
            progress.evaluated(ROW, 1234.0)
    assert out.getvalue() == "epoch 1/2  loss 2.0000  test loss 1.5000  accuracy 50.00 %  1,234 samples/s\n"
    assert silent.getvalue() == ""


def test_evaluate_weighs_every_sample_once_and_leaves_the_model_in_training() -> None:
    dataset = open_dataset("digits")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)).train()
    loss, accuracy = evaluate(model, dataset, World())
    assert model.training
    model.eval()
    x, y = dataset.as_torch("test").batch(np.arange(len(dataset.as_torch("test"))))
    scores = model(x)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(scores, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config({"output": str(tmp_path / "run")})
    folder = RunFolder(config)
    curve = folder.path / "metrics.jsonl"
    folder.add(ROW)
    curve.rename(tmp_path / "kept")
    curve.symlink_to("/dev/full")
    for epoch in (2.0, 3.0):
        folder.add({**ROW, "epoch": epoch})
    assert capsys.readouterr().err == (
        f"hpcasync: warning: can't write {curve}: No space left on device. The run goes on and tries again\n"
    )
    with pytest.raises(UsageError, match="No space left"):
        folder.finish({}, [rank([1])], config, World())
    curve.unlink()
    (tmp_path / "kept").rename(curve)
    folder.finish({}, [rank([1])], config, World())
    assert [json.loads(line)["epoch"] for line in curve.read_text().splitlines()] == [1, 2, 3]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    config = make_config({"output": str(tmp_path / "run")})
    folder = RunFolder(config)
    folder.add({**ROW, "test_loss": float("nan")})
    folder.finish({"test_loss": float("inf"), "staleness": {"mean": float("nan")}}, [rank([1])], config, World())
    assert json.loads((folder.path / "metrics.jsonl").read_text())["test_loss"] is None
    assert json.loads((folder.path / "result.json").read_text()) == {"test_loss": None, "staleness": {"mean": None}}
    assert np.isnan(read_curves(folder.path)["test_loss"][0])
