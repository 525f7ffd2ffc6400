"""Time accounting and staleness histograms."""

from __future__ import annotations

import time

import pytest

from hpcasync.backoff import LONGEST, Backoff
from hpcasync.stats import Staleness, TimeShare, median_interval


def test_clock_runs_between_start_and_stop() -> None:
    share = TimeShare()
    assert share.shares() == {"compute": 0, "communicate": 0, "wait": 0}
    share.add("wait", 5)
    assert share.wait == 0, "the clock does not run: nothing is counted"
    share.start()
    time.sleep(0.05)
    with share.phase("communicate"):
        time.sleep(0.05)
    with share.phase("wait"):
        time.sleep(0.1)
    share.start()  # no effect: it runs
    share.stop()
    total = share.seconds
    time.sleep(0.02)
    assert share.seconds == total
    assert total >= 0.2 and share.compute >= 0.049 and share.communicate >= 0.049 and share.wait >= 0.099
    assert share.compute + share.communicate + share.wait == pytest.approx(total)
    assert sum(share.shares().values()) == pytest.approx(1)
    share.stop()
    assert share.seconds == total
    share.start()
    time.sleep(0.01)
    assert share.seconds >= total + 0.01


def test_phase_counts_also_when_its_body_fails() -> None:
    share = TimeShare()
    share.start()
    with pytest.raises(KeyError), share.phase("wait"):
        time.sleep(0.01)
        raise KeyError
    assert share.wait >= 0.01


def test_staleness_summary() -> None:
    assert Staleness().summary() == {"mean": 0, "p50": 0, "p95": 0, "max": 0}
    staleness = Staleness()
    for tau in [0] * 50 + [2] * 40 + [10] * 10:
        staleness.add(tau)
    assert staleness.summary() == {"mean": pytest.approx(1.8), "p50": 0, "p95": 10, "max": 10}
    staleness = Staleness()
    staleness.add(7)
    assert staleness.summary() == {"mean": 7, "p50": 7, "p95": 7, "max": 7}


def test_staleness_grows_and_merges() -> None:
    a, b = Staleness(), Staleness()
    for tau in (0, 63, 64, 1000):
        a.add(tau)
    b.add(1)
    both = a.merge(b)
    assert both.counts.sum() == 5 and b.merge(a).counts.tolist() == both.counts.tolist()
    assert [int(i) for i in both.counts.nonzero()[0]] == [0, 1, 63, 64, 1000]
    assert a.counts.sum() == 4 and b.counts.sum() == 1


def test_backoff_yields_then_sleeps_in_growing_steps() -> None:
    backoff = Backoff()
    pauses = [backoff.pause() for _ in range(40)]
    assert min(pauses) >= 0
    assert all(pause >= 0.9 * LONGEST for pause in pauses[-5:])


def test_median_interval_by_hand() -> None:
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    assert median_interval([5.0, 1.0, 2.0]) == (2.0, 1.0, 5.0), "too few for 95 %: the extremes"
    # n = 6: 1 - 2 / 64 = 96.9 % between the extremes; n = 9: 96.1 % between the second ones (binomial table)
    assert median_interval([1, 2, 3, 4, 5, 6]) == (3.5, 1.0, 6.0)
    assert median_interval(list(range(1, 10))) == (5.0, 2.0, 8.0)
