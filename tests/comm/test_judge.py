"""Who is named when nothing moves: the judgement alone; real jobs stall in tests/cli/test_stall.py."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.comm.judge import Stall, judge, named
from hpcasync.comm.signs import BARRIER, BEAT, GRADIENTS, LEFT, PHASE, PID, STATE, STEPS, WAITS, WORDS

PLACES = [(0, "a"), (0, "a"), (1, "b"), (1, "b")]


def found(changes: dict[int, dict[int, int]], me: int = 0, silent: dict[int, float] | None = None) -> Stall | None:
    """The judgement over four ranks that wait for the average of step 8, but for these words."""
    lines = np.zeros((4, WORDS), np.int64)
    lines[:, [BEAT, WAITS, STEPS]] = 5, GRADIENTS, 7
    lines[:, PID] = 100 + np.arange(4)
    for rank, words in changes.items():
        for word, value in words.items():
            lines[rank, word] = value
    states = {0: "S", 1: "T"} if changes.get(1) else {0: "S", 1: "S"}
    quiet = np.array([(silent or {}).get(r, 0.0) for r in range(4)])
    return judge(lines, quiet, states, PLACES, me, 10.0)


def test_a_rank_that_works_while_the_others_wait() -> None:
    stall = found({2: {WAITS: 0}})
    text = "rank 2 has not come to the average of the gradients of step 8, where ranks 0, 1, 3 waited for 10.0 s"
    assert str(stall) == f"{text}\n  rank 2 (process 102 on b): alive, in step 8"
    stall = found({2: {WAITS: 0}}, silent={2: 4.0})  # stopped after the others had begun to wait, perhaps
    assert str(stall) == f"{text}\n  rank 2 (process 102 on b): heard of last 4.0 s ago, in step 8"


def test_only_the_lowest_that_waits_and_lives_acts() -> None:
    late = {0: {WAITS: 0}}
    assert found(late, me=0) is None and found(late, me=2) is None
    stall = found(late, me=1)
    assert stall is not None and list(stall.missing) == [0]
    stopped = found({1: {PHASE: 2}}, me=0)
    assert stopped is not None and "stopped by a signal or a debugger, in evaluation after step 7" in stopped.missing[1]


def test_a_silent_rank_of_another_node_is_named_though_it_had_come() -> None:
    stall = found({}, silent={3: 9.0})
    assert stall is not None and list(stall.missing) == [3]
    assert "no sign of life from there" in stall.missing[3] and "in the average of the gradients of step 8" in stall.missing[3]


def test_nobody_is_missing() -> None:
    text = str(found({3: {WAITS: BARRIER}}))
    assert "no rank is missing" in text and text.endswith("; rank 3 in a barrier after step 7")


def test_ranks_that_have_left_or_were_never_heard() -> None:
    stall = found({3: {STATE: LEFT, WAITS: 0}, 2: {BEAT: 0, WAITS: 0}})
    assert stall is not None and not stall.missing and stall.unheard == [2] and "of rank 2 nothing is known" in str(stall)


@pytest.mark.parametrize(("ranks", "text"), [([2], "rank 2"), ([1, 0], "ranks 0, 1"), ([0, 1, 2, 5], "ranks 0-2, 5")])
def test_names_of_ranks(ranks: list[int], text: str) -> None:
    assert named(ranks) == text
