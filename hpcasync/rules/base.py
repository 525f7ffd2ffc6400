"""What a rule is: options with ranges, named state vectors, and one call that applies a gradient to a piece of the state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import BASES, HYPER, VARIANTS, fused_update

BASE_VECTORS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "nesterov": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}
"""State vectors of each base, named as torch names them in an optimizer's ``state_dict``."""

DEFAULT_LR = {
    "sgd": 0.05,
    "momentum": 0.02,
    "nesterov": 0.02,
    "rmsprop": 5e-4,
    "adam": 5e-4,
    "adamw": 5e-4,
    "amsgrad": 5e-4,
}


@dataclass(frozen=True)
class Vector:
    """One state vector of a rule: its name and the value that every element starts with."""

    name: str
    start: float = 0.0


def between(name: str, value: Any, low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> None:
    """Raise ``UsageError`` unless ``value`` is a finite number in the interval that the arguments describe."""
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{name}={value!r}: expected a finite number in {interval}")
    if value < low or value > high or (low_open and value == low) or (high_open and value == high):
        raise UsageError(f"{name}={value!r}: expected a number in {interval}")


def run_fused(threads: int, *args: Any) -> None:
    """``fused_update`` of ``args``, on several threads where the caller may use them."""
    if threads > 1:
        from hpcasync.kernels import team

        team.update(threads, *args)
    else:
        fused_update(*args)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one gradient does to the shared parameters: a base step, which a subclass may modify.

    Pure: flat float32 arrays in and out, no MPI and no torch. Instances are immutable; the hyper-parameters named by
    ``group_options`` start from here and may then differ per parameter group and change while training (schedulers).

    Attributes:
        lr: learning rate, > 0; ``None`` takes the default of the base.
        base: base step, one of ``BASES``; each follows the torch optimizer of that name.
        momentum: decay of the momentum buffer (momentum, nesterov), in [0, 1).
        alpha: decay of RMSProp's squared average, in [0, 1).
        betas: decays of Adam's moments, each in [0, 1).
        eps: added to the denominator of the adaptive bases, >= 0.
        weight_decay: L2 coefficient, >= 0; decoupled for adamw.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    lr: float | None = None
    base: str = "sgd"
    momentum: float = 0.9
    alpha: float = 0.99
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise unknown("base", str(self.base), BASES)
        if self.lr is None:
            object.__setattr__(self, "lr", DEFAULT_LR[self.base])
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        self.check_options(self.group_options())

    @property
    def variant(self) -> str:
        """The modifier of this rule, one of ``kernels.VARIANTS``."""
        return "none"

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """The state vectors beside ``w``, in the order of their rows: the base's, then the modifier's."""
        return tuple(Vector(n) for n in BASE_VECTORS[self.base]) + self.modifier_vectors()

    def modifier_vectors(self) -> tuple[Vector, ...]:
        """The state vectors that the modifier adds."""
        return ()

    def group_options(self) -> dict[str, Any]:
        """The hyper-parameters that a parameter group may override, with this rule's values."""
        # Only Adam's bases have betas: OneCycleLR cycles the momentum of a group that has none.
        names = ("lr", "momentum", "alpha", "betas", "eps", "weight_decay")
        adam = "exp_avg" in BASE_VECTORS[self.base]
        return {n: getattr(self, n) for n in names if n != "betas" or adam}

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise ``UsageError`` for a hyper-parameter of a group that is out of its range."""
        between("lr", group["lr"], 0, math.inf, low_open=True)
        between("momentum", group["momentum"], 0, 1, high_open=True)
        between("alpha", group["alpha"], 0, 1, high_open=True)
        betas = group.get("betas", self.betas)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise UsageError(f"betas={betas!r}: expected two numbers in [0, 1)")
        for i, beta in enumerate(betas):
            between(f"betas[{i}]", beta, 0, 1, high_open=True)
        between("eps", group["eps"], 0, math.inf)
        between("weight_decay", group["weight_decay"], 0, math.inf)

    def hyper(self, group: Mapping[str, Any]) -> np.ndarray:
        """The kernel's hyper-parameter vector (float64, laid out by ``HYPER``) for one parameter group."""
        h = np.zeros(len(HYPER))
        for name in ("lr", "weight_decay", "momentum", "alpha", "eps"):
            h[HYPER[name]] = group[name]
        h[HYPER["beta1"]], h[HYPER["beta2"]] = group.get("betas", self.betas)
        return h

    def update(
        self,
        state: np.ndarray,
        start: int,
        grad: np.ndarray,
        out: np.ndarray,
        hyper: np.ndarray,
        count: int,
        tau: int,
        *,
        threads: int = 1,
    ) -> None:
        """Apply ``grad`` to the elements from ``start`` on, in place, and write the new ``w`` to ``out``.

        Args:
            state: float32 (1 + vectors, n): ``w`` and the state vectors.
            start: first element.
            grad: float32 (m,).
            out: float32 (m,), on entry the parameters that the gradient was taken at, on return the new ones.
            hyper: what ``hyper()`` returned for the parameter group.
            count: number of this update of the shard, from 1.
            tau: staleness, updates applied to the shard since the caller read it.
            threads: threads to work on it.
        """
        run_fused(
            threads,
            state,
            start,
            grad,
            out,
            BASES[self.base],
            VARIANTS[self.variant],
            False,
            False,
            len(BASE_VECTORS[self.base]),
            hyper,
            count,
            tau,
        )

    def warm_up(self) -> None:
        """Load or compile the kernel now, so that no step pays for it."""
        state = np.zeros((1 + len(self.vectors), 1), np.float32)
        self.update(state, 0, np.zeros(1, np.float32), state[0], self.hyper(self.group_options()), 1, 0)

    def reference(
        self, state: dict[str, np.ndarray], grad: np.ndarray, group: Mapping[str, Any], count: int, tau: int
    ) -> None:
        """The same update in plain numpy, straight from the formula: the oracle of the tests.

        Args:
            state: ``{"w": ..., name: ...}``, float32 arrays, replaced by new ones.
            grad: float32 (n,).
            group: hyper-parameters, as a parameter group holds them.
            count: number of this update, from 1.
            tau: staleness.
        """
        from hpcasync.rules.reference import base_step

        step, keep = base_step(self.base, state, grad, group, count)
        step = self.reference_modifier(state, step, group, tau)
        state["w"] = keep * state["w"] + step

    def reference_modifier(
        self, state: dict[str, np.ndarray], step: np.ndarray, group: Mapping[str, Any], tau: int
    ) -> np.ndarray:
        """The modifier in plain numpy: takes the base's step, returns the step to apply."""
        return step

    def describe(self) -> dict[str, Any]:
        """Name and options, for records and for the check that all ranks agree."""
        return {"name": self.name, **dataclasses.asdict(self)}
