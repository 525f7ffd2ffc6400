"""EASGD and EAMSGD: workers explore on copies of their own, which an elastic force ties to a shared centre."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.kernels import HYPER
from hpcasync.rules.base import BASE_VECTORS, Rule, Vector, between, whole


@dataclass(frozen=True, kw_only=True)
class EASGD(Rule):
    """Elastic averaging SGD, asynchronous.

    Each worker makes steps of the base on its own copy ``w_j``, with vectors of its own. In its first step and in every
    ``period``-th after it, the copy and the shared centre ``w`` first draw each other: ``e = a (w_j - w); w += e;
    w_j -= e``; then ``w_j`` takes the base's step with the gradient at the ``w_j`` from before. The result of the training
    is the centre: ``synchronize()`` shows it on every rank, and the workers go on from it as from a new start, with
    their momentum.

    Source: Zhang, Choromanska, LeCun, NIPS 2015 (arXiv 1412.6651), algorithm 1; the defaults of ``period`` and
    ``moving_rate`` are of its experiments.

    Attributes:
        period: steps from one exchange to the next, >= 1.
        moving_rate: ``a``, the strength of an exchange, in (0, 1]; None takes ``0.9 / workers``.
    """

    name: ClassVar[str] = "easgd"
    paper: ClassVar[str] = "Zhang, Choromanska, LeCun, NIPS 2015"
    own_copy: ClassVar[bool] = True

    period: int = 10
    moving_rate: float | None = None

    def __post_init__(self) -> None:
        whole("period", self.period, 1)
        if self.moving_rate is not None:
            between("moving_rate", self.moving_rate, 0, 1, low_open=True)
        super().__post_init__()

    @property
    def every(self) -> int:
        return self.period

    @property
    def vectors(self) -> tuple[Vector, ...]:
        return ()

    @property
    def private_vectors(self) -> tuple[Vector, ...]:
        return tuple(Vector(n) for n in BASE_VECTORS[self.base])

    @property
    def rate(self) -> float:
        """``a`` for the number of workers that the rule is bound to."""
        return 0.9 / self.workers if self.moving_rate is None else self.moving_rate

    def plan_options(self) -> dict[str, int]:
        return super().plan_options() | {"own_copy": 1}

    def tune(self, hyper: np.ndarray, count: int, tau: int) -> np.ndarray:
        hyper = hyper.copy()  # not in hyper(): that may be asked of a rule not yet bound
        hyper[HYPER["moving_rate"]] = self.rate
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
        from hpcasync.rules.reference import base_step

        assert own is not None
        if arrival:
            e = np.float32(self.rate) * (own["w"] - state["w"])
            state["w"], own["w"] = state["w"] + e, own["w"] - e
        step, keep = base_step(self.base, own, grad, group, count)
        own["w"] = keep * own["w"] + step


@dataclass(frozen=True, kw_only=True)
class EAMSGD(EASGD):
    """EASGD with Nesterov's momentum on the workers' copies.

    Source: Zhang, Choromanska, LeCun, NIPS 2015, algorithm 2. RECONSTRUCTION in one point: momentum is in torch's form,
    where the copy that a worker holds is the paper's look-ahead point ``x + mu v``, so the exchange is of that point.

    Attributes:
        base: nesterov by default.
    """

    name: ClassVar[str] = "eamsgd"
    base: str = "nesterov"
