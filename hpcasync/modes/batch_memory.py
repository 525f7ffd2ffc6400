"""The memory of guided SGD: the last batches of a worker, how consistent each has been, and which of them to replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from hpcasync.errors import UsageError

MOST_REPLAYS = 4
B = TypeVar("B")


def most_replays(rho: int) -> int:
    """The most batches that are replayed of ``rho`` remembered ones."""
    return min(MOST_REPLAYS, rho // 2)


class BatchMemory(Generic[B]):
    """Remembered batches and their scores. It knows no model: losses come in, batches to replay come out.

    Args:
        rho: batches remembered, >= 2.

    Raises:
        UsageError: another ``rho``.

    Source: Sharma, Appl. Soft Comput. 102:107084, 2021 (arXiv 2101.07259), by the authors' code.
    """

    def __init__(self, rho: int) -> None:
        if isinstance(rho, bool) or not isinstance(rho, int) or rho < 2:
            raise UsageError(f"rho={rho!r}: expected a whole number >= 2, or None for unguided")
        self.rho = rho
        self._batches: list[tuple[int, B]] = []
        self._psi: list[float] = []
        self._before = float("nan")  # verification loss after the last update; first used when two batches are remembered

    def add(self, step: int, batch: B) -> None:
        """Remember the batch of an update."""
        self._batches.append((step, batch))
        self._psi.append(0.0)

    @property
    def older(self) -> list[B]:
        """The remembered batches but the newest, the oldest first."""
        return [batch for _, batch in self._batches[:-1]]

    @property
    def full(self) -> bool:
        """Whether ``rho`` batches are remembered: time for the replays."""
        return len(self._batches) >= self.rho

    @property
    def scores(self) -> tuple[float, ...]:
        """``psi`` of each remembered batch, the oldest first."""
        return tuple(self._psi)

    def score(self, verification: float, losses: Sequence[float]) -> None:
        """After an update: ``psi[h] += sign (E_before - losses[h])``, the sign +1 if ``E`` fell and -1 if not.

        Args:
            verification: ``E``, the loss on the verification batch.
            losses: of the batches ``older``, in their order.
        """
        sign = 1.0 if verification < self._before else -1.0
        for h, loss in enumerate(losses):
            self._psi[h] += sign * (self._before - loss)
        self._before = verification

    def take(self) -> list[tuple[int, B]]:
        """Steps and batches to replay, the best first; the memory starts anew, the verification loss is kept."""
        # A stable sort: of equals the older comes first. NaN is not > 0.
        best = sorted((h for h, psi in enumerate(self._psi) if psi > 0), key=lambda h: -self._psi[h])
        chosen = [self._batches[h] for h in best[: most_replays(self.rho)]]
        self.clear()
        return chosen

    def clear(self) -> None:
        """Forget the batches and their scores."""
        self._batches, self._psi = [], []

    def state_dict(self) -> dict[str, Any]:
        """The remembered batches, their scores, and the last verification loss."""
        return {"batches": list(self._batches), "psi": list(self._psi), "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._batches, self._psi = list(state["batches"]), list(state["psi"])
        self._before = state["before"]
