"""What ranks tell their launcher, and it them in the next start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcasync import launched
from hpcasync.report.deaths import death_sentences


def test_a_checkpoint_knows_the_deaths_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    known = {"rank": 2, "time": 5.5, "epoch": 3, "step": 1, "samples": 70, "updates": 7, "shards": [1]}
    launched.note_death(known)
    launched.note_hung([1])
    told = sorted(launched.noted_deaths(tmp_path), key=lambda of: of["rank"])
    assert told[1] == known and told[0]["rank"] == 1 and told[0]["cause"] == "hung"
    monkeypatch.setenv(launched.RESTARTED, json.dumps(told))
    assert launched.restarted()
    assert launched.earlier_deaths([known]) == [known, told[0]]  # each once, with what the rank had done alone
    older = launched.earlier_deaths([])  # a checkpoint from before counts their work itself
    assert [(of["rank"], of["updates"], "epoch" in of) for of in older] == [(1, 0, False), (2, 0, False)]
    assert "hung. The job was started again" in death_sentences(older, {}, None)[0]


def test_the_first_abort_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched.note_abort(1)  # without a launcher nothing
    assert launched.aborted_with(tmp_path) is None
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    launched.note_abort(76)
    launched.note_abort(1)
    assert launched.aborted_with(tmp_path) == 76
