"""Whatever is wrong with a record, ``replay`` says it in one line and leaves with 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import pytest

from hpcasync.cli import main
from tests.mpi import MpiRun
from tests.replay.helpers import FROZEN, changed, record

MODEL = """
import torch
def linear(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
"""


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command leaves with."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said
    return said


def other_facts(run: Path, name: str, **facts: object) -> Path:
    """A copy of a run whose records tell other facts."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for path in (copy / "record").glob("*.h5"):
        with h5py.File(path, "a") as file:
            file.attrs["facts"] = json.dumps({**json.loads(file.attrs["facts"]), **facts})
    return copy


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # no MPI in what is tested
def test_every_case(mpirun: MpiRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (mpirun.folder / "mine.py").write_text(MODEL)
    small = ("--batch", "240", "--rule", "asgd")
    folder = record(
        mpirun,
        {
            "run": (*small, *FROZEN),
            "bare": (*small, "--no-record"),
            "free": ("--rule", "hogwild", "--batch", "240"),
            "sync": ("--mode", "sync", "--batch", "240"),
            "own": (*small, "--model", "mine:linear"),
        },
        2,
    )
    run = folder / "run"
    assert "bare holds no record" in error_of(capsys, "replay", folder / "bare")
    assert "nowhere: no such folder" in error_of(capsys, "replay", folder / "nowhere")
    assert "hogwild" in error_of(capsys, "replay", folder / "free")
    assert "mode sync" in (said := error_of(capsys, "replay", folder / "sync")) and "same bits" in said
    assert main(["timeline", str(folder / "sync")]) == 0

    missing = other_facts(run, "missing")
    (missing / "record/rank-00001.h5").unlink()
    assert "rank-00001.h5 is missing: the run had 2 ranks" in error_of(capsys, "replay", missing)
    shutil.copy(missing / "record/rank-00000.h5", missing / "record/rank-00001.h5")
    assert "is the record of rank 0, expected rank 1" in error_of(capsys, "replay", missing)
    shutil.copy(folder / "own/record/rank-00001.h5", missing / "record/rank-00001.h5")
    assert "is of another run" in error_of(capsys, "replay", missing)
    whole = (run / "record/rank-00001.h5").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no HDF5", b""):
        (missing / "record/rank-00001.h5").write_bytes(damaged)
        assert "rank-00001.h5: can't be read as a record" in error_of(capsys, "replay", missing)
    for table, field in (("steps", "first"), ("events", "batch"), ("events", "hyper"), ("events", "kind")):
        value = 200 if field == "kind" else 10_000
        assert "is damaged: " in error_of(capsys, "replay", changed(run, field, 1, table, 1, field, value))
    shutil.copy(run / "result.json", missing / "record/rank-00001.h5")
    error_of(capsys, "timeline", missing)

    code = json.loads(h5py.File(run / "record/rank-00000.h5").attrs["facts"])["code"]
    old = other_facts(run, "old", code={**code, "hpcasync": "0.0.1+abc"})
    assert "recorded by other code: hpcasync 0.0.1+abc then" in (said := error_of(capsys, "replay", old)) and "--any-code" in said
    assert main(["replay", str(old), "--any-code"]) == 0
    assert "checksum sha256:0" in error_of(capsys, "replay", other_facts(run, "data", data="sha256:0"))
    assert "'digts'" in error_of(capsys, "replay", run, "--data", "digts")
    assert "starts from other parameters" in error_of(capsys, "replay", other_facts(run, "start", start_sha256="0"))
    assert "recorded on cuda" in error_of(capsys, "replay", other_facts(run, "gpu", device="cuda"))

    monkeypatch.chdir(folder)
    assert main(["replay", "own"]) == 0
    (folder / "mine.py").write_text(MODEL + "# changed\n")
    assert "mine:linear+" in error_of(capsys, "replay", "own")

    for flags, words in (
        (("--until", "0"), "--until 0"),
        (("--until", "4"), "no rank of"),
        (("--compare", folder / "own"), "has the model tests.replay.nets:frozen"),
        (("--compare", run / "config.toml"), "is a file"),
        (("--inspect", "1"), "RANK:STEP"),
        (("--inspect", "2:1"), "ranks 0 to 1"),
        (("--inspect", "1:9999"), "rank 1 made 3 steps"),
        (("--compare", folder / "bare"), "bare holds no record"),
    ):
        assert words in error_of(capsys, "replay", run, *flags)
    assert "FIRST:LAST" in error_of(capsys, "timeline", run, "--steps", "3")
    assert "trace.json" in error_of(capsys, "timeline", run, "-o", run / "result.json/trace.json")
