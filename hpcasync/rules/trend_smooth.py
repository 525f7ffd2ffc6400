"""Trend-Smooth asynchronous SGD: shrink the step of each dimension by what the parameter trend says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import HYPER, PLAN, VARIANTS, fused_update
from hpcasync.rules.base import NO_VECTORS, Rule, Vector, between, yes_or_no

_MODIFIER_VECTORS = {
    "opposed": (Vector("trend"),),
    "opposed-strength": (Vector("trend"), Vector("trend_size")),
    "consistency": (Vector("trend"), Vector("trend_size")),
    "rate": (Vector("trend"), Vector("rate", 1.0)),
}
_TINY = np.float32(1e-30)


@dataclass(frozen=True, kw_only=True)
class TrendSmooth(Rule):
    """Shrink the learning rate of each dimension by the parameter trend.

    With ``d`` the step of the base, the trend ``T = beta T + (1-beta) d``, the mean step size
    ``A = beta A + (1-beta) |d|`` and the consistency ``r = |T| / A`` in [0, 1], the step applied is ``c d``:

    - ``opposed``: ``c = shrink`` where ``d T < 0``, else 1;
    - ``opposed-strength``: ``c = 1 - (1-floor) r`` where ``d T < 0``, else 1;
    - ``consistency``: ``c = floor + (1-floor) r`` everywhere;
    - ``rate``: ``c`` is a state: times ``down`` where ``d T < 0``, else times ``up``, kept within [floor, 1].

    Source: the idea (shrink where the gradient opposes the trend) from Cui, Guo, Fan, Lan, Cheng, IEEE Access
    7:156848, 2019, abstract. All formulas are our RECONSTRUCTION, since no full text is public; see docs/algorithms.md.

    Attributes:
        variant: which formula: consistency, opposed, opposed-strength or rate, see docs/algorithms.md.
        beta: decay of the trend, in [0, 1).
        shrink: constant of ``opposed`` in (0, 1], or ``"staleness"`` for ``1 / (1 + tau)``.
        floor: least factor, in [0, 1].
        up: recovery of ``rate``, >= 1.
        down: shrinkage of ``rate``, in (0, 1].
        masked: the trend follows the shrunk steps ``c d`` (``c`` is then judged by the trend before this step).
    """

    name: ClassVar[str] = "trend-smooth"
    paper: ClassVar[str] = "Cui et al., IEEE Access 7:156848, 2019 (reconstruction)"

    variant: str = "consistency"
    beta: float = 0.99
    shrink: float | str = 0.5
    floor: float = 0.02
    up: float = 1.02
    down: float = 0.9
    masked: bool = False

    def __post_init__(self) -> None:
        if self.variant not in _MODIFIER_VECTORS:
            raise unknown("variant", str(self.variant), _MODIFIER_VECTORS)
        yes_or_no("masked", self.masked)
        super().__post_init__()

    def modifier_vectors(self) -> tuple[Vector, ...]:
        return _MODIFIER_VECTORS[self.variant]

    def group_options(self) -> dict[str, Any]:
        names = ("beta", "shrink", "floor", "up", "down")
        return super().group_options() | {n: getattr(self, n) for n in names}

    def check_options(self, group: Mapping[str, Any]) -> None:
        super().check_options(group)
        between("beta", group["beta"], 0, 1, high_open=True)
        if isinstance(group["shrink"], str):
            if group["shrink"] != "staleness":
                raise UsageError(f"shrink={group['shrink']!r}: expected a number in (0, 1] or 'staleness'")
        else:
            between("shrink", group["shrink"], 0, 1, low_open=True)
        between("floor", group["floor"], 0, 1)
        between("up", group["up"], 1, math.inf)
        between("down", group["down"], 0, 1, low_open=True)

    def hyper(self, group: Mapping[str, Any]) -> np.ndarray:
        h = super().hyper(group)
        h[HYPER["trend_beta"]] = group["beta"]
        h[HYPER["shrink"]] = -1 if group["shrink"] == "staleness" else group["shrink"]
        for name in ("floor", "up", "down"):
            h[HYPER[name]] = group[name]
        return h

    def plan_options(self) -> dict[str, int]:
        return super().plan_options() | {"variant": VARIANTS[self.variant], "masked": int(self.masked)}

    def shrink_share(self, state: np.ndarray, grad: np.ndarray, hyper: np.ndarray, count: int, tau: int) -> float:
        """The part of the base's step, in L1 norm, that the rule would take away from ``grad``: 0 nothing, 1 all of it.

        Args:
            state: float32 (1 + vectors, m), not changed.
            grad, hyper, count, tau: as for ``update``.

        Returns:
            ``1 - |c d| / |d|``; NaN where the base makes no step.
        """
        decay, alone = HYPER["weight_decay"], hyper.copy()
        if hyper[decay] and self.base != "adamw":
            grad = grad + np.float32(hyper[decay]) * state[0]
        alone[decay] = 0  # with w = 0 the new w is the step itself
        plain = self.plan.copy()
        plain[PLAN["variant"]] = VARIANTS["none"]
        lengths = []
        for plan in (plain, self.plan):
            rows = state.copy()
            rows[0] = 0
            fused_update(rows, 0, grad, rows[0], NO_VECTORS, plan, alone, count, tau, 1)
            lengths.append(float(np.abs(rows[0]).sum(dtype=np.float64)))
        return 1 - lengths[1] / lengths[0] if lengths[0] else math.nan

    def reference_modifier(
        self, state: dict[str, np.ndarray], step: np.ndarray, group: Mapping[str, Any], tau: int
    ) -> np.ndarray:
        one, floor, beta = np.float32(1), np.float32(group["floor"]), np.float32(group["beta"])
        rest = np.float32(1 - group["beta"])

        def average(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return beta * old + rest * new

        # The masked trend can only be judged before this step: the shrunk step is not known yet.
        sees_step = not self.masked or self.variant == "consistency"
        trend = average(state["trend"], step) if sees_step else state["trend"]
        if "trend_size" in state:
            size = average(state["trend_size"], np.abs(step)) if sees_step else state["trend_size"]
            r = np.abs(trend) / (size + _TINY)
        opposed = trend * step < 0
        if self.variant == "opposed":
            shrink = 1 / (1 + tau) if group["shrink"] == "staleness" else group["shrink"]
            c = np.where(opposed, np.float32(shrink), one)
        elif self.variant == "opposed-strength":
            c = np.where(opposed, one - (one - floor) * r, one)
        elif self.variant == "consistency":
            c = floor + (one - floor) * r
        else:
            rate, up, down = state["rate"], np.float32(group["up"]), np.float32(group["down"])
            c = state["rate"] = np.where(opposed, np.maximum(floor, rate * down), np.minimum(one, rate * up))
        followed = c * step if self.masked else step
        if "trend_size" in state:
            state["trend_size"] = average(state["trend_size"], np.abs(followed))
        state["trend"] = average(state["trend"], followed)
        return c * step
