"""The scores of guided SGD against the formula, written out; what is replayed and when."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.errors import UsageError
from hpcasync.modes.batch_memory import BatchMemory, most_replays


@pytest.mark.parametrize("rho", [2, 5, 10, 11])
def test_scores_are_the_formula(rho: int) -> None:
    rng = np.random.default_rng(rho)
    memory: BatchMemory[int] = BatchMemory(rho)
    before, psi, replayed = np.nan, np.zeros(0), 0
    for step in range(1, 6 * rho + 1):
        memory.add(step, -step)
        psi = np.append(psi, 0.0)
        verification, losses = rng.random(), rng.random(len(psi) - 1)
        assert memory.older == [-s for s in range(step - len(psi) + 1, step)]
        memory.score(verification, losses.tolist())
        sign = 1 if verification < before else -1
        psi[:-1] += sign * (before - losses)
        before = verification
        assert memory.scores == pytest.approx(tuple(psi), abs=1e-15)
        assert memory.full == (len(psi) == rho)
        if memory.full:
            order = [h for h in np.argsort(-psi, kind="stable") if psi[h] > 0][: min(4, rho // 2)]
            first = step - rho + 1
            assert memory.take() == [(first + h, -(first + h)) for h in order]
            assert memory.scores == () and memory.older == []
            psi = np.zeros(0)
            replayed += len(order)
    assert replayed > 0


def test_without_a_loss_before_nothing_is_replayed() -> None:
    """The first update has no verification loss to compare with; NaN losses are never consistent."""
    memory: BatchMemory[str] = BatchMemory(2)
    memory.add(1, "a")
    memory.score(1.0, [])
    memory.add(2, "b")
    memory.score(0.5, [float("nan")])
    assert memory.full and memory.take() == []


def test_most_replays() -> None:
    assert [most_replays(rho) for rho in (2, 3, 4, 7, 8, 10, 1000)] == [1, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("rho", [1, 0, -1, 2.0, True, None])
def test_bad_rho(rho: object) -> None:
    with pytest.raises(UsageError, match="expected a whole number >= 2"):
        BatchMemory(rho)  # type: ignore[arg-type]
