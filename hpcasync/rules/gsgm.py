"""GSGM: for data that differ from worker to worker; every worker once per round, averaged gradients, one momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import GRADIENTS
from hpcasync.rules.base import Rule, Vector, between, whole

f32 = np.float32
_AVERAGES = ("window", "round", "groups")
_OUT_OF_TURN = ("hold", "discard")
_SEEN, _ROUND, _POSITION = 0, 1, 2  # a shard's notes


@dataclass(frozen=True, kw_only=True)
class GSGM(Rule):
    """Gradient scheduling with global momentum.

    White list: a round lets every worker push once; a worker whose turn is used waits for the round to turn. The base step
    is given ``G``, the mean of the last M accepted gradients, so the base's vectors are the one global momentum: ``ema`` is
    ``v = mu v + (1-mu) G``, ``momentum`` the heavy ball; ``adam`` or ``rmsprop`` may take their place.

    - ``average="window"`` with M = workers: the sum of every worker's newest gradient, each worker keeps its own last
      one (``sum += g - g_last``, as in SAG), divided by the number of workers that have pushed this shard so far. The
      contribution of a worker that left stays in the sum; when one has died, all begin anew at the next ``synchronize()``.
    - ``average="window"`` with M < workers: a ring of M gradients in the shared state.
    - ``average="round"``: the running mean of the gradients of this round so far.
    - ``average="groups"``: M accepted gradients in a row make a group; the base takes one step per group, with its mean, and
      the pushes before the group's last only read. M = workers is one step per round. A group may reach into the next round;
      one that is not full when the training ends is not applied.

    A worker that waits for a slower one longer than ``patience`` lets the rounds turn without it, until the slow one
    comes: its gradient is applied once, in the round that the others are in. Workers that have finished or synchronise
    are not waited for.

    Source: the idea (white list, partly averaged gradients, global momentum) from Li et al., IEEE IoT-J 9(19):18817, 2022
    (arXiv 1902.07848), abstract. All formulas are our RECONSTRUCTION; see docs/algorithms.md.

    Attributes:
        momentum: mu, decay of the global momentum, in [0, 1). 0.5, not torch's 0.9: no source gives a value, and 0.9 was below
            0.5 in every main cell of our table (docs/results.md).
        average: mean of the last M gradients, ``"window"``; of this round's so far, ``"round"``; of M, once, ``"groups"``.
        window: M, gradients in the window or group, 1 .. workers; None takes the number of workers.
        out_of_turn: a worker whose turn is used holds its gradient and waits (``"hold"``), or throws it away and goes on
            (``"discard"``).
        patience: seconds that a worker waits for its turn before rounds turn without the slower ones, > 0.
    """

    name: ClassVar[str] = "gsgm"
    paper: ClassVar[str] = "Li et al., IEEE IoT-J 9(19):18817, 2022 (reconstruction)"
    in_turn: ClassVar[bool] = True

    base: str = "ema"
    momentum: float = 0.5
    average: str = "window"
    window: int | None = None
    out_of_turn: str = "hold"
    patience: float = 30.0

    def __post_init__(self) -> None:
        if self.average not in _AVERAGES:
            raise unknown("average", str(self.average), _AVERAGES)
        if self.out_of_turn not in _OUT_OF_TURN:
            raise unknown("out_of_turn", str(self.out_of_turn), _OUT_OF_TURN)
        if self.window is not None:
            whole("window", self.window, 1)
            if self.average == "round":
                raise UsageError(f"window={self.window}: belongs to average='window' or 'groups', found {self.average!r}")
        between("patience", self.patience, 0, math.inf, low_open=True)
        super().__post_init__()

    def bind(self, workers: int) -> GSGM:
        if self.window is not None and self.window > workers:
            raise UsageError(f"window={self.window}: expected at most the number of workers, {workers}")
        return super().bind(workers)

    @property
    def size(self) -> int:
        """M for the number of workers that the rule is bound to."""
        return self.workers if self.window is None else self.window

    @property
    def stage(self) -> str:
        """The gradient stage for the number of workers that the rule is bound to."""
        if self.size == 1 or self.workers == 1:
            return "own"
        if self.average != "window":
            return self.average
        return "sum" if self.size == self.workers else "ring"

    def modifier_vectors(self) -> tuple[Vector, ...]:
        if self.stage == "ring":
            return tuple(Vector(f"gradient_{i}") for i in range(self.size))
        # The sum without the workers' own last gradients could never be corrected: both start anew after loading, as groups do.
        made = {"own": (), "round": (Vector("round_mean"),), "sum": (Vector("gradient_sum", saved=False),)}
        return {**made, "groups": (Vector("group_mean", saved=False),)}[self.stage]

    @property
    def private_vectors(self) -> tuple[Vector, ...]:
        return (Vector("last_gradient"),) if self.stage == "sum" else ()

    def plan_options(self) -> dict[str, int]:
        return super().plan_options() | {"gradient": GRADIENTS[self.stage], "window": self.size}

    def arrive(self, notes: np.ndarray, first: bool, clock: int) -> int:
        if self.stage == "round":
            if notes[_ROUND] != clock:
                notes[_ROUND], notes[_POSITION] = clock, 0
            notes[_POSITION] += 1
            return int(notes[_POSITION])
        if self.stage == "groups":
            notes[_POSITION] = notes[_POSITION] % self.size + 1
            return int(notes[_POSITION])
        notes[_SEEN] += first
        return int(notes[_SEEN])

    def reference(
        self,
        state: dict[str, np.ndarray],
        grad: np.ndarray,
        group: Mapping[str, Any],
        count: int,
        tau: int,
        *,
        own: dict[str, np.ndarray] | None = None,
        arrival: int = 1,
    ) -> None:
        own = {"w": state["w"]} if own is None else own
        if self.stage == "groups":
            mean = state["group_mean"]
            state["group_mean"] = grad if arrival == 1 else mean + (grad - mean) / f32(arrival)
            if arrival < self.size:
                own["w"] = state["w"]
                return
            count = math.ceil(count / self.size)
        super().reference(state, grad, group, count, tau, own=own, arrival=arrival)

    def reference_gradient(
        self,
        state: dict[str, np.ndarray],
        grad: np.ndarray,
        group: Mapping[str, Any],
        count: int,
        own: dict[str, np.ndarray],
        arrival: int,
    ) -> np.ndarray:
        if self.stage == "own":
            return grad
        if self.stage == "groups":
            return state["group_mean"]
        if self.stage == "round":
            mean = state["round_mean"]
            mean = state["round_mean"] = grad if arrival == 1 else mean + (grad - mean) / f32(arrival)
            return mean
        if self.stage == "sum":
            state["gradient_sum"] = state["gradient_sum"] + (grad - own["last_gradient"])
            own["last_gradient"] = grad
            return state["gradient_sum"] / f32(arrival)
        state[f"gradient_{(count - 1) % self.size}"] = grad
        filled = min(count, self.size)
        mean = state["gradient_0"]
        for i in range(1, filled):
            mean = mean + state[f"gradient_{i}"]
        return mean / f32(filled)
