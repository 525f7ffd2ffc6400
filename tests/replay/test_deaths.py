"""Runs that outlive ranks are replayed to the same bits, wherever a rank died."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from hpcasync.cli import main
from hpcasync.train.record_file import read_record
from tests.launch.survivors import SurvivingJob
from tests.mpi import REPO, require_lane
from tests.replay.helpers import replay

RULES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "asgd": ("--base", "adam", "--schedule", "cosine"),
    "trend-smooth": ("--base", "momentum"),
    "staleness-aware": (),
    "dc-asgd": (),
    "easgd": ("--partition", "shards:4"),
    "eamsgd": (),
    "apam": (),
    "gsgm": (),
    "guided": ("--rule", "asgd", "--guided", "--rho", "4"),
}
DEATHS = {3: ("step", 50), 2: ("shard", 27), 1: ("update", 61)}
"""Between two updates; between two shards of a push; with half a shard updated."""
IN_MEETINGS = {3: ("averaged", 1), 2: ("unrecorded", 2), 1: ("uncounted", 900)}


def survived(folder: Path, lane: str, deaths: dict[int, tuple[str, int]], epochs: str, *words: str) -> dict[str, Any]:
    """A recorded run of four ranks in ``folder``/run, of which these die; its result."""
    env = {"DEATHS": json.dumps(deaths), "PYTHONPATH": str(REPO)}
    common = ("--data", "digits", "--model", "tests.replay.dying:norm", "--epochs", epochs, "--batch", "8", "--record")
    with SurvivingJob(require_lane(lane), folder / "run", *common, *words, env=env) as job:
        code, result, err = job.end()
    assert code == 0, err
    assert {death["rank"] for death in result["deaths"]} == set(deaths), err
    return result


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_after_deaths(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = () if rule == "guided" else ("--rule", rule)
    lane = "openmpi" if rule == "asgd" else "mpich"  # no MPI in what differs between the rules
    result = survived(tmp_path, lane, DEATHS, "3", *words, *RULES[rule])
    held = {death["rank"]: len(death["shards"]) for death in result["deaths"]}
    assert held == {3: 0, 2: 0, 1: 1}
    records = read_record(tmp_path / "run")
    assert [len(r.pending) for r in records] == [0, 1, 1, 0] and any(name.startswith("state-") for name in records[0].deaths)
    code, found = replay(capsys, tmp_path / "run")
    assert code == 0 and found["identical"] and found["complete"], found
    assert found["parameters_sha256"] == result["parameters_sha256"]


def test_meetings_that_a_death_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = survived(tmp_path, "mpich", IN_MEETINGS, "4", "--rule", "asgd")
    run = tmp_path / "run"
    code, found = replay(capsys, run)
    assert code == 0 and found["complete"], found
    for death in result["deaths"]:  # the step that replay --inspect takes
        steps = len(read_record(run)[death["rank"]].steps)
        assert death["recorded"] in (steps, steps - 1) and death["recorded"] > 0
    assert main(["timeline", str(run)]) == 0 and main(["report", str(run)]) == 0
    capsys.readouterr()
    entries = json.loads((run / "trace.json").read_text())["traceEvents"]
    died = {e["tid"]: e for e in entries if e["ph"] == "i"}
    assert set(died) == set(IN_MEETINGS) and {e["name"] for e in died.values()} == {"died"}
    for rank, death in died.items():
        own = [e for e in entries if e["ph"] == "X" and e["tid"] == rank]
        assert max(e["ts"] + e["dur"] for e in own) <= death["ts"] + 0.01
        assert death["args"]["epoch"] == {3: 1, 2: 2, 1: 3}[rank]
    assert any(e["args"].get("why") == "died in it" for e in entries if e["ph"] == "X" and e["tid"] == 1)
    text = " ".join((run / "report.html").read_text().split())
    places = [text.index(words) for words in ("<h2>Deaths</h2>", "Rank 3 died at", "Rank 2 died at", "Rank 1 died at")]
    assert places == sorted(places)
    assert all(f"(step {death['recorded']} of its record)" in text for death in result["deaths"])
    assert "Given free: the lock of shard" in text and "all samples dealt anew from epoch 2 on" in text
    # Without what the record keeps of the deaths the bits are others, and a damaged one is an error.
    for change, expected in (("meeting", 1), ("state", 1), ("shape", 2)):
        copy = tmp_path / change
        shutil.copytree(run, copy)
        with h5py.File(copy / "record" / "rank-00000.h5", "a") as file:
            names = [name for name in file["deaths"] if name.startswith("state" if change == "shape" else change)]
            assert names
            for name in names:
                del file["deaths"][name]
                if change == "shape":
                    file["deaths"][name] = [1.0]
        assert main(["replay", str(copy)]) == expected, change
