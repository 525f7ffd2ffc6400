"""APAM: AMSGrad on stale gradients, with the options of the paper and of the authors' code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import HYPER
from hpcasync.rules.base import Rule, between, yes_or_no

f32 = np.float32
_STYLES: dict[str, dict[str, Any]] = {
    "code": {"bias_correction": True, "eps": 1e-8},
    "paper": {"bias_correction": False, "eps": 0.0},
}
_STEP_SIZES = ("constant", "sqrt")


@dataclass(frozen=True, kw_only=True)
class APAM(Rule):
    """Asynchronous parallel AMSGrad.

    ``m = b1 m + (1-b1) g``; ``s = b2 s + (1-b2) g^2``; ``s_max = max(s_max, s)``;
    ``w = Proj(w - alpha_k m / (sqrt(s_max) + eps))`` with ``alpha_k = lr`` or ``lr / sqrt(k)``, ``k`` the shard's update
    count, and the projection onto a box, which the paper's weighted projection is for a box. With bias correction ``m``
    and ``s_max`` are divided as in torch's AMSGrad. Where ``sqrt(s_max) + eps`` is 0 there is no step.

    The theory needs bounded staleness: ``Async`` bounds it by ``default_staleness`` (16) unless another bound is given.

    Source: Xu, Xu, Yan, Sutcher-Shepard, Grinberg, Chen, Math. Prog. Comp. 2023 (arXiv 2002.09095), and the authors' code.

    Attributes:
        style: where the defaults of bias_correction and eps come from: ``"code"`` (True, 1e-8) or ``"paper"`` (False, 0).
        bias_correction: whether the moments are bias-corrected; None takes that of ``style``.
        eps: added to the denominator, >= 0; None takes that of ``style``.
        step_size: of update k: ``"constant"``, or ``"sqrt"`` for ``lr / sqrt(k)``.
        low: lower end of the box that every parameter is kept in; None: none.
        high: upper end of the box, > ``low``; None: none.
    """

    name: ClassVar[str] = "apam"
    paper: ClassVar[str] = "Xu et al., Math. Prog. Comp. 2023 (arXiv 2002.09095)"
    bases: ClassVar[tuple[str, ...]] = ("amsgrad",)
    default_staleness: ClassVar[int | None] = 16

    base: str = "amsgrad"
    style: str = "code"
    bias_correction: bool | None = None
    eps: float | None = None  # type: ignore[assignment]
    step_size: str = "constant"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.style not in _STYLES:
            raise unknown("style", str(self.style), _STYLES)
        for name, value in _STYLES[self.style].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        yes_or_no("bias_correction", self.bias_correction)
        if self.step_size not in _STEP_SIZES:
            raise unknown("step_size", str(self.step_size), _STEP_SIZES)
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), -math.inf, math.inf)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise UsageError(f"low={self.low!r}, high={self.high!r}: expected low < high")
        super().__post_init__()

    def hyper(self, group: Mapping[str, Any]) -> np.ndarray:
        h = super().hyper(group)
        h[HYPER["low"]] = -math.inf if self.low is None else self.low
        h[HYPER["high"]] = math.inf if self.high is None else self.high
        return h

    def plan_options(self) -> dict[str, int]:
        boxed = self.low is not None or self.high is not None
        own = {"guarded": 1, "uncorrected": int(not self.bias_correction), "boxed": int(boxed)}
        return super().plan_options() | own

    def tune(self, hyper: np.ndarray, count: int, tau: int) -> np.ndarray:
        if self.step_size == "constant":
            return hyper
        hyper = hyper.copy()
        hyper[HYPER["lr"]] /= math.sqrt(count)
        return hyper

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
        b1, b2 = group["betas"]
        lr = group["lr"] if self.step_size == "constant" else group["lr"] / math.sqrt(count)
        g = grad + f32(group["weight_decay"]) * state["w"] if group["weight_decay"] else grad
        m = state["exp_avg"] = state["exp_avg"] + f32(1 - b1) * (g - state["exp_avg"])
        s = state["exp_avg_sq"] = f32(b2) * state["exp_avg_sq"] + f32(1 - b2) * g * g
        s_max = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], s)
        first, second = (1 - b1**count, np.sqrt(1 - b2**count)) if self.bias_correction else (1.0, 1.0)
        below = np.sqrt(s_max) / f32(second) + f32(group["eps"])
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(below > 0, -f32(lr / first) * m / below, f32(0))
        low = f32(-np.inf if self.low is None else self.low)
        high = f32(np.inf if self.high is None else self.high)
        state["w"] = own["w"] = np.clip(state["w"] + step, low, high)
