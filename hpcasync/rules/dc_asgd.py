"""DC-ASGD: a stale gradient is compensated by a cheap guess of how it changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.kernels import GRADIENTS, HYPER
from hpcasync.rules.base import Rule, Vector, between, yes_or_no

f32 = np.float32


@dataclass(frozen=True, kw_only=True)
class DCASGD(Rule):
    """Delay-compensated asynchronous SGD.

    The base step is given ``g + lambda g g (w - w_read)``: a first-order expansion of the gradient from the parameters that
    the worker read to the present ones, with ``lambda g g`` for the diagonal of the Hessian. ``w_read`` is the worker's
    own copy of the parameters, so it costs no memory. Adaptive: ``lambda = compensation / sqrt(s + square_eps)`` with the
    mean square ``s = a s + (1-a) g^2`` from 0. Weight decay is added afterwards, with the present ``w``: it needs no guess.

    Source: Zheng et al., ICML 2017 (arXiv 1609.08326), DC-ASGD-c and DC-ASGD-a. The paper's base is sgd; others are ours.

    Attributes:
        adaptive: the adaptive lambda.
        compensation: lambda, or with ``adaptive`` its numerator, >= 0; None takes 0.04, or 2 with ``adaptive``.
        square_decay: ``a``, decay of the mean square of the adaptive lambda, in [0, 1).
        square_eps: added to that mean square, > 0.
    """

    name: ClassVar[str] = "dc-asgd"
    paper: ClassVar[str] = "Zheng et al., ICML 2017"

    adaptive: bool = False
    compensation: float | None = None
    square_decay: float = 0.95
    square_eps: float = 1e-7

    def __post_init__(self) -> None:
        yes_or_no("adaptive", self.adaptive)
        if self.compensation is None:
            object.__setattr__(self, "compensation", 2.0 if self.adaptive else 0.04)
        super().__post_init__()

    def modifier_vectors(self) -> tuple[Vector, ...]:
        return (Vector("mean_square"),) if self.adaptive else ()

    def group_options(self) -> dict[str, Any]:
        names = ("compensation", "square_decay", "square_eps")
        return super().group_options() | {n: getattr(self, n) for n in names}

    def check_options(self, group: Mapping[str, Any]) -> None:
        super().check_options(group)
        between("compensation", group["compensation"], 0, math.inf)
        between("square_decay", group["square_decay"], 0, 1, high_open=True)
        between("square_eps", group["square_eps"], 0, math.inf, low_open=True)

    def hyper(self, group: Mapping[str, Any]) -> np.ndarray:
        h = super().hyper(group)
        for name in ("compensation", "square_decay", "square_eps"):
            h[HYPER[name]] = group[name]
        return h

    def plan_options(self) -> dict[str, int]:
        stage = "compensated-adaptive" if self.adaptive else "compensated"
        return super().plan_options() | {"gradient": GRADIENTS[stage]}

    def reference_gradient(
        self,
        state: dict[str, np.ndarray],
        grad: np.ndarray,
        group: Mapping[str, Any],
        count: int,
        own: dict[str, np.ndarray],
        arrival: int,
    ) -> np.ndarray:
        strength: Any = f32(group["compensation"])
        if self.adaptive:
            a = group["square_decay"]
            s = state["mean_square"] = f32(a) * state["mean_square"] + f32(1 - a) * grad * grad
            strength = strength / np.sqrt(s + f32(group["square_eps"]))
        return grad + strength * grad * (grad * (state["w"] - own["w"]))
