"""The push that a rank died in, found from the shards' versions. Real deaths: tests/launch/test_survive.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcasync.modes.recorder import Event
from hpcasync.replay.deaths import with_last_pushes
from hpcasync.train.record_file import read_record
from tests.mpi import MpiRun
from tests.replay.helpers import record
from tests.replay.test_replay import only_mpich


@only_mpich
def test_the_push_of_a_death_is_found_again(mpirun: MpiRun) -> None:
    records = read_record(record(mpirun, {"run": ("--rule", "asgd", "--base", "momentum")}, 3) / "run")
    whole = records[1].events
    last = int(np.flatnonzero(whole["kind"] == Event.PUSH)[-1])
    cut = replace(records[1], events=whole[:last], closed=False, end={})
    ended = replace(records[0], end={**records[0].end, "deaths": [{"rank": 1, "shards": []}]})
    found = with_last_pushes([ended, cut, records[2]])
    for name in ("kind", "hyper", "step", "batch", "clock", "versions"):
        assert np.array_equal(found[1].events[name], whole[name][: last + 1]), name
    assert [len(r.events) for r in (found[0], found[2])] == [len(records[0].events), len(records[2].events)]
    # Nobody died: nothing is added, though the record is cut.
    assert len(with_last_pushes([records[0], cut, records[2]])[1].events) == last
