"""What a rule is: options with ranges, named state vectors, and one call that applies a gradient to a piece of the state."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.kernels import BASES, HYPER, PLAN, fused_update, team

BASE_VECTORS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "nesterov": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "ema": ("momentum_buffer",),
    "adagrad": ("sum",),
}
"""State vectors of each base, named as torch names them in an optimizer's ``state_dict``."""

ADAM_BASES = ("adam", "adamw", "amsgrad")
OPTION_BASES = {
    "momentum": ("momentum", "nesterov", "ema"),
    "alpha": ("rmsprop",),
    "betas": ADAM_BASES,
    "eps": ("rmsprop", "adagrad", *ADAM_BASES),
}
"""The bases that use an option; with any other base it must stay at its default."""

DEFAULT_LR = {
    "sgd": 0.05,
    "momentum": 0.01,
    "nesterov": 0.01,
    "rmsprop": 5e-4,
    "adam": 5e-4,
    "adamw": 5e-4,
    "amsgrad": 5e-4,
    "ema": 0.05,
    "adagrad": 0.01,
}

NO_VECTORS = np.zeros((0, 0), np.float32)
R = TypeVar("R", bound="Rule")


@dataclass(frozen=True)
class Vector:
    """One state vector of a rule.

    Attributes:
        name: as in the optimizer's ``state_dict``.
        start: value that every element starts with.
        saved: False for a vector that means nothing without the workers' private ones: it starts anew after loading.
    """

    name: str
    start: float = 0.0
    saved: bool = True


def between(name: str, value: Any, low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> None:
    """Raise ``UsageError`` unless ``value`` is a finite number in the interval that the arguments describe."""
    ends = "(" if low_open else "[", ")" if high_open or math.isinf(high) else "]"
    interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{name}={value!r}: expected a finite number in {interval}")
    if value < low or value > high or (low_open and value == low) or (high_open and value == high):
        raise UsageError(f"{name}={value!r}: expected a number in {interval}")


def whole(name: str, value: Any, low: int) -> None:
    """Raise ``UsageError`` unless ``value`` is a whole number >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name}={value!r}: expected a whole number >= {low}")


def yes_or_no(name: str, value: Any) -> None:
    """Raise ``UsageError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name}={value!r}: expected True or False")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one gradient does to the shared parameters: a base step, which a subclass may modify.

    Pure: flat float32 arrays in and out, no MPI and no torch. Instances are immutable; the hyper-parameters named by
    ``group_options`` start from here and may then differ per parameter group and change while training (schedulers).

    A subclass says by class attributes what it asks of the store and of the mode: ``bases`` it runs on; ``lock_free``:
    shards are updated without locks, updates may be lost; ``in_turn``: a worker pushes once per round
    (``Store.may_push``); ``own_copy``: the worker's copy of ``w`` is its own and meets the shared one only in every
    ``every``-th step; ``default_staleness``: the bound that ``Async`` sets when none is given; ``default_lr``: by base.

    Attributes:
        lr: learning rate, > 0; ``None`` takes the default of the base.
        base: base step: sgd, momentum, nesterov, ema, rmsprop, adagrad, adam, adamw or amsgrad; all but ema follow the torch
            optimizer of that name.
        momentum: decay of the momentum buffer (momentum, nesterov, ema), in [0, 1).
        alpha: decay of RMSProp's squared average, in [0, 1).
        betas: decays of Adam's moments, each in [0, 1).
        eps: added to the denominator of the adaptive bases, >= 0.
        weight_decay: L2 coefficient, >= 0; decoupled for adamw.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    bases: ClassVar[tuple[str, ...]] = tuple(BASES)
    lock_free: ClassVar[bool] = False
    in_turn: ClassVar[bool] = False
    own_copy: ClassVar[bool] = False
    default_staleness: ClassVar[int | None] = None
    default_lr: ClassVar[Mapping[str, float]] = DEFAULT_LR
    workers: ClassVar[int] = 1  # of the class; ``bind`` gives an instance its own

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
        if self.base not in self.bases:
            raise UsageError(f"rule {self.name!r} has base {' or '.join(self.bases)}, found {self.base!r}")
        if self.lr is None:
            object.__setattr__(self, "lr", self.default_lr[self.base])
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        self.check_options(self.group_options())
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, bases in OPTION_BASES.items():
            if self.base not in bases and getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"{name}={getattr(self, name)!r}: base {self.base!r} does not use it (its default is "
                    f"{defaults[name]!r}); it belongs to base {', '.join(bases)}"
                )

    def bind(self: R, workers: int) -> R:
        """This rule for so many workers; the stores bind theirs. Idempotent.

        Raises:
            UsageError: an option that does not fit the number of workers.
        """
        bound = copy.copy(self)
        bound.__dict__.pop("plan", None)
        object.__setattr__(bound, "workers", workers)
        return bound

    @property
    def every(self) -> int:
        """A worker's copy meets the shared parameters in every so many of its steps."""
        return 1

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """The shared state vectors beside ``w``, in the order of their rows: the base's, then the rule's own."""
        return tuple(Vector(n) for n in BASE_VECTORS[self.base]) + self.modifier_vectors()

    @property
    def private_vectors(self) -> tuple[Vector, ...]:
        """The vectors that each worker has for itself; the store keeps them in its ``Worker``, a checkpoint too."""
        return ()

    def modifier_vectors(self) -> tuple[Vector, ...]:
        """The shared state vectors that the rule adds to the base's."""
        return ()

    def group_options(self) -> dict[str, Any]:
        """The hyper-parameters that a parameter group may override, with this rule's values."""
        # Only Adam's bases have betas: OneCycleLR cycles the momentum of a group that has none.
        names = ("lr", "momentum", "alpha", "betas", "eps", "weight_decay")
        return {n: getattr(self, n) for n in names if n != "betas" or self.base in ADAM_BASES}

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

    def plan_options(self) -> dict[str, int]:
        """The whole-number settings of the kernel by name (see ``kernels.PLAN``); 0 for those not named."""
        return {"base": BASES[self.base], "vectors": len(BASE_VECTORS[self.base])}

    @cached_property
    def plan(self) -> np.ndarray:
        """``plan_options`` as the kernel reads them: int64, laid out by ``PLAN``."""
        plan = np.zeros(len(PLAN), np.int64)
        for name, value in self.plan_options().items():
            plan[PLAN[name]] = value
        return plan

    def tune(self, hyper: np.ndarray, count: int, tau: int) -> np.ndarray:
        """The hyper-parameter vector for one update: ``hyper`` itself, or a changed copy."""
        return hyper

    def arrive(self, notes: np.ndarray, first: bool, clock: int) -> int:
        """What the shard notes when a gradient arrives: called once per push of a shard, under its lock.

        Args:
            notes: int64 (4,), the shard's, for the rule to write; 0 at the start.
            first: whether it is the worker's first push of this shard.
            clock: pushes of the worker before this one.

        Returns:
            ``arrival`` for ``update``.
        """
        return 1

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
        private: np.ndarray = NO_VECTORS,
        arrival: int = 1,
    ) -> None:
        """Apply ``grad`` to the elements from ``start`` on, in place, and write the new ``w`` to ``out``.

        Args:
            state: float32 (1 + vectors, n): ``w`` and the state vectors.
            start: first element.
            grad: float32 (m,).
            out: float32 (m,), on entry the parameters that the gradient was taken at, on return the new ones.
            hyper: what ``hyper()`` returned for the parameter group.
            count: number of this update of the shard, from 1 (with ``own_copy``: of this worker).
            tau: staleness, updates applied to the shard since the caller read it.
            threads: threads to work on it.
            private: float32 (private vectors, n), the worker's own.
            arrival: what ``arrive`` returned; 0 for a step of a worker's own copy without the shared one.
        """
        args = (state, start, grad, out, private, self.plan, self.tune(hyper, count, tau), count, tau, arrival)
        if threads > 1 and grad.size > team.CHUNK:
            team.update(threads, *args)
        else:
            fused_update(*args)

    def warm_up(self) -> None:
        """Load or compile the kernel now, so that no step pays for it."""
        state = np.zeros((1 + len(self.vectors), 1), np.float32)
        private = np.zeros((len(self.private_vectors), 1), np.float32)
        hyper = self.hyper(self.group_options())
        self.update(state, 0, np.zeros(1, np.float32), state[0], hyper, 1, 0, private=private)

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
        """The same update in plain numpy, straight from the formula: the oracle of the tests.

        Args:
            state: ``{"w": ..., name: ...}``, float32 arrays, replaced by new ones.
            grad: float32 (n,).
            group: hyper-parameters, as a parameter group holds them.
            count: number of this update, from 1.
            tau: staleness.
            own: the worker's copy ``"w"`` and its private vectors, replaced too; None: it has just read ``state["w"]``.
            arrival: as for ``update``.
        """
        from hpcasync.rules.reference import base_step

        own = {"w": state["w"]} if own is None else own
        grad = self.reference_gradient(state, grad, group, count, own, arrival)
        step, keep = base_step(self.base, state, grad, self.reference_group(group, count, tau), count)
        step = self.reference_modifier(state, step, group, tau)
        state["w"] = own["w"] = keep * state["w"] + step

    def reference_group(self, group: Mapping[str, Any], count: int, tau: int) -> Mapping[str, Any]:
        """``tune`` for the reference: the hyper-parameters of one update."""
        return group

    def reference_gradient(
        self,
        state: dict[str, np.ndarray],
        grad: np.ndarray,
        group: Mapping[str, Any],
        count: int,
        own: dict[str, np.ndarray],
        arrival: int,
    ) -> np.ndarray:
        """The gradient stage in plain numpy: takes the worker's gradient, returns the one to apply."""
        return grad

    def reference_modifier(
        self, state: dict[str, np.ndarray], step: np.ndarray, group: Mapping[str, Any], tau: int
    ) -> np.ndarray:
        """The modifier in plain numpy: takes the base's step, returns the step to apply."""
        return step

    def describe(self) -> dict[str, Any]:
        """Name and options, for records and for the check that all ranks agree."""
        return {"name": self.name, **dataclasses.asdict(self)}
