"""``Guided``: remember the last batches, score how consistent they are, and replay the best ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcasync.errors import UsageError
from hpcasync.modes.asynchronous import Async
from hpcasync.modes.batch_memory import BatchMemory, most_replays
from hpcasync.modes.sync import Sync

_COUNTS = ("evaluations", "gradients", "replays", "last_replayed", "_steps")


class Guided:
    """Guided SGD in parallel: gSSGD around a `Sync`, gASGD around an `Async`.

    After each ordinary update, with ``E`` the loss on the verification batch, every remembered batch ``h`` but the newest
    gets ``psi[h] += sign (E_before - loss(h))``, where the sign is +1 if ``E`` fell and -1 if not. When ``rho`` batches
    are remembered, the ``min(4, rho // 2)`` of largest psi are replayed, if psi > 0, the best first: one more step of the
    wrapped optimizer each, with the gradient at the current parameters. Then memory and scores start anew.

    Around `Sync` the verification loss is the mean over the ranks, each rank scores and replays its own batches, all make as
    many replays as the rank that has most, and a rank that has fewer contributes zero to the mean; ``step`` is
    collective. Around `Async` every rank goes by itself.

    A batch is remembered by reference and must not be changed. Scores are taken in evaluation mode where the wrapped
    optimizer knows the model. The remembered batches are in this object's ``state_dict``, not in the wrapped optimizer's.

    Args:
        mode: a `Sync` or an `Async`.
        loss: takes a batch, returns the scalar loss of the model on it.
        verification: a batch of training data, such as ``hpcasync.data.verification_batch`` draws; never test data.
        rho: batches remembered, >= 2; None is unguided.

    Attributes:
        evaluations: forward passes of this rank for verification and scores.
        gradients: gradients of this rank for replays.
        replays: updates of this rank that were replays; around `Sync` those of other ranks' batches too.
        last_replayed: numbers of the steps, from 1, whose batches this rank has replayed last, in their order.
        replaying: number of the step whose batch is being replayed just now, 0 for none.
        scored: told the final scores, ``psi``, of the remembered batches before the best are replayed.

    Raises:
        UsageError: another mode, rho below 2, or ranks that disagree on it.

    Source: Sharma, Appl. Soft Comput. 102:107084, 2021 (arXiv 2101.07259), by the authors' code.
    """

    def __init__(
        self, mode: Async | Sync, loss: Callable[[Any], Tensor], verification: Any, *, rho: int | None = 10
    ) -> None:
        if not isinstance(mode, (Async, Sync)):
            raise UsageError(f"Guided wraps a Sync or an Async; found {type(mode).__name__}")
        self._memory: BatchMemory[Any] | None = None if rho is None else BatchMemory(rho)
        found = mode.world.gather(rho)
        if any(r != found[0] for r in found):
            raise UsageError(f"rho differs between the ranks: {found}; give all the same")
        self.mode = mode
        self.rho = rho
        self.evaluations = self.gradients = self.replays = 0
        self.last_replayed: tuple[int, ...] = ()
        self.replaying = 0
        self.scored: Callable[[Sequence[float]], None] = lambda scores: None
        self._loss = loss
        self._verification = verification
        self._steps = 0

    def step(self, batch: Any) -> Tensor:
        """Train on ``batch``: gradient, update, scores, and after the ``rho``-th batch the replays.

        Returns:
            The loss on ``batch`` before the update, detached.
        """
        self._steps += 1
        loss = self._update(batch)
        memory = self._memory
        if memory is None:
            return loss
        memory.add(self._steps, batch)
        with self._scoring():
            now = self._agreed(self._evaluate(self._verification))
            memory.score(now, [self._evaluate(old) for old in memory.older])
        if memory.full:
            self._replay(memory)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the remembered batches with their scores; without the wrapped optimizer's state."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"counts": counts, "memory": None if self._memory is None else self._memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        for name in _COUNTS:
            setattr(self, name, state["counts"][name])
        if self._memory is not None and state["memory"] is not None:
            self._memory.load_state_dict(state["memory"])

    def synchronize(self) -> None:
        """As of the wrapped optimizer. Collective."""
        self.mode.synchronize()

    def close(self) -> None:
        """As of the wrapped optimizer. Collective."""
        if self._memory is not None:
            self._memory.clear()
        self.mode.close()

    def _update(self, batch: Any) -> Tensor:
        self.mode.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        self.mode.step()
        return loss.detach()

    def _replay(self, memory: BatchMemory[Any]) -> None:
        self.scored(memory.scores)
        chosen = memory.take()
        for i in range(self._most(len(chosen), most_replays(memory.rho))):
            if i < len(chosen):
                self.replaying, batch = chosen[i]
                self._update(batch)
                self.replaying = 0
                self.gradients += 1
            else:
                self.mode.zero_grad()
                self.mode.step()
            self.replays += 1
        self.last_replayed = tuple(step for step, _ in chosen)

    def _evaluate(self, batch: Any) -> float:
        self.evaluations += 1
        with torch.no_grad():
            return float(self._loss(batch))

    def _agreed(self, value: float) -> float:
        """The mean over the ranks of a synchronous mode: all must see the same sign."""
        world = self.mode.world
        if isinstance(self.mode, Async) or world.size == 1:
            return value
        total = np.array([value])
        with self.mode.share.phase("communicate"):
            world.collectives.allreduce(total)
        return float(total[0]) / world.size

    def _most(self, count: int, most: int) -> int:
        """The largest count of any rank of a synchronous mode."""
        world = self.mode.world
        if isinstance(self.mode, Async) or world.size == 1:
            return count
        counts = np.zeros(most + 1)
        counts[count] = 1
        with self.mode.share.phase("communicate"):
            world.collectives.allreduce(counts)
        return int(np.flatnonzero(counts)[-1])

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Evaluation mode: scores change no statistics and draw no random numbers."""
        model = self.mode._model
        modes = [(module, module.training) for module in model.modules()] if model is not None else []
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
