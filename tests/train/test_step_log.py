"""The record of step times: right differences, bounded, blocks of consecutive steps, in and out of a run file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcasync.errors import UsageError
from hpcasync.train.step_log import BLOCK, BLOCKS, StepLog, read_steps, write_steps


class Share:
    """A clock by hand."""

    compute = communicate = wait = copy = 0.0


def log_of(steps: int) -> StepLog:
    """Step i computes i seconds, communicates 0.25, waits 0.25 for a GPU's copies and 0.25 for others."""
    share = Share()
    log = StepLog(share)  # type: ignore[arg-type]
    for i in range(steps):
        share.compute += 1000  # an evaluation
        log.begin()
        share.compute += i
        share.communicate += 0.25
        share.copy += 0.25
        share.wait += 0.25
        log.step()
    return log


@pytest.mark.parametrize("steps", [0, 1, BLOCK, BLOCK + 7, BLOCK * BLOCKS])
def test_few_steps_are_kept_as_they_are(steps: int) -> None:
    found = log_of(steps).record()
    assert found["steps"].shape == (steps, 3) and found["every"] == 1
    np.testing.assert_allclose(found["steps"][:, 0], np.arange(steps), atol=0.5)
    assert (found["steps"][:, 1:] == [0.5, 0.25]).all()


@pytest.mark.parametrize("more", [1, BLOCK, BLOCK + 1, 2 * BLOCK * BLOCKS + 5])
def test_of_many_steps_every_so_manyth_block_is_kept(more: int) -> None:
    steps = BLOCK * BLOCKS + more
    found = log_of(steps).record()
    every = found["every"]
    expected = [i for i in range(steps) if i // BLOCK % every == 0]
    assert every == (2 if more < BLOCK * BLOCKS else 4)
    assert len(expected) <= BLOCK * BLOCKS
    np.testing.assert_allclose(found["steps"][:, 0], expected, atol=2)


def test_meetings_and_the_run_file(tmp_path: Path) -> None:
    log = log_of(3)
    share = log._share
    share.communicate, share.wait = share.communicate + 2, share.wait + 3
    log.meeting()
    with h5py.File(tmp_path / "run.h5", "w") as file:
        write_steps(file, [log.record(), log_of(5).record()])
    found = read_steps(tmp_path)
    assert found is not None
    steps, meetings = found
    assert steps.shape == (2, 5, 3) and np.isnan(steps[0, 3:]).all() and not np.isnan(steps[1]).any()
    assert meetings[0].tolist() == [[0, 2, 3, 2 + 0.75]] and np.isnan(meetings[1]).all()
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["ranks/seconds"] = [1.0]
    assert read_steps(tmp_path) is None
    with pytest.raises(UsageError, match="not a finished run"):
        read_steps(tmp_path / "nowhere")
