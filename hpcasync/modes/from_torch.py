"""From a torch optimizer that a framework has configured to a mode that trains with the other ranks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn, optim

from hpcasync.comm import World
from hpcasync.errors import UsageError, unknown
from hpcasync.modes.asynchronous import Async
from hpcasync.modes.base import Mode
from hpcasync.modes.hierarchical import Hierarchical
from hpcasync.modes.kstep import KStep
from hpcasync.modes.local import RuleOptimizer, torch_optimizer
from hpcasync.modes.sync import Sync
from hpcasync.rules import Rule, make_rule
from hpcasync.rules.base import OPTION_BASES

WRAPPERS: dict[str, Any] = {"sync": Sync, "kstep": KStep}
WINDOWS: dict[str, Any] = {"async": Async, "hierarchical": Hierarchical}
_OWN = ("self", "optimizer", "params", "rule", "world", "model")
_SHARED = ("lr", "momentum", "alpha", "betas", "eps", "weight_decay")
# Options of torch optimizers that no base step has: value at which they do nothing.
_UNKNOWN = {"dampening": 0, "maximize": False, "centered": False, "lr_decay": 0, "initial_accumulator_value": 0}


def check_mode(mode: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown mode, or an option that it does not have.

    Raises:
        UsageError: by name.
    """
    modes = WRAPPERS | WINDOWS
    if mode not in modes:
        raise unknown("mode", str(mode), modes)
    known = [name for name in inspect.signature(modes[mode]).parameters if name not in _OWN]
    for name in options:
        if name not in known:
            raise UsageError(f"mode {mode!r} has no option {name!r}. It has: {', '.join(known)}.")


def make_mode(
    mode: str,
    optimizer: optim.Optimizer,
    *,
    rule: str | Rule | None = None,
    rule_options: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    world: World | None = None,
    model: nn.Module | None = None,
) -> Mode:
    """The mode around the parameters of ``optimizer``. Collective.

    Groups, learning rates and schedules stay those of ``optimizer``: what writes to its groups writes to the mode's.

    Args:
        mode: ``"async"``, ``"sync"``, ``"kstep"`` or ``"hierarchical"``.
        optimizer: of torch, or a `RuleOptimizer`, before its first step.
        rule: see ``rule_of``; without one, ``sync`` and ``kstep`` run ``optimizer`` itself.
        rule_options: see ``rule_of``.
        options: of the mode's class, such as ``{"staleness": 16}``.
        world: from ``hpcasync.init()``.
        model: whose buffers to average.

    Raises:
        UsageError: as ``rule_of`` and the mode's class.
    """
    options = dict(options or {})
    check_mode(mode, options)
    if not isinstance(optimizer, optim.Optimizer) or isinstance(optimizer, Mode):
        raise UsageError(
            f"mode {mode} starts from a torch optimizer, such as torch.optim.SGD(...); found {type(optimizer).__name__}"
        )
    common = {"world": world, "model": model, **options}
    made: Mode
    if mode in WINDOWS:
        made = WINDOWS[mode](optimizer.param_groups, rule_of(optimizer, rule, rule_options), **common)
    elif rule is None and not rule_options:
        return WRAPPERS[mode](optimizer, **common)
    else:
        made = WRAPPERS[mode](torch_optimizer(rule_of(optimizer, rule, rule_options), optimizer.param_groups), **common)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers would warn that it never steps
    share_groups(optimizer, made)
    return made


def share_groups(optimizer: optim.Optimizer, mode: Mode) -> None:
    """Let what writes to the groups of ``optimizer`` write to those of ``mode``; again after loading a state."""
    optimizer.param_groups = mode.param_groups


def rule_of(optimizer: optim.Optimizer, rule: str | Rule | None = None, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule whose base step is that of ``optimizer``.

    Args:
        optimizer: SGD, RMSprop, Adagrad, Adam or AdamW of torch, which says the base and its hyper-parameters; or a
            `RuleOptimizer`, which has a rule.
        rule: name of a rule; None takes that of a `RuleOptimizer`, else ``asgd``. A rule itself must agree with ``optimizer``.
        options: what the rule has beside the base, such as ``{"shrink": 0.3}``.

    Raises:
        UsageError: an optimizer that is no base step, or options that say something else than it.
    """
    options = dict(options or {})
    if isinstance(optimizer, RuleOptimizer):
        if rule is not None or options:
            raise UsageError(f"the optimizer has rule {optimizer.rule.name!r} already: leave rule and rule_options out")
        return optimizer.rule
    base = _base_of(optimizer)
    if isinstance(rule, Rule):
        if options:
            raise UsageError("rule_options beside a rule: give them to the rule itself, or the rule by its name")
        for name, value in base.items():
            if getattr(rule, name) != value:
                raise UsageError(
                    f"{type(rule).__name__} has {name}={getattr(rule, name)!r}, the optimizer {type(optimizer).__name__} "
                    f"{name}={value!r}. The optimizer's counts, with its schedule: make them equal, or give the rule by its "
                    f"name, rule={rule.name!r}, with rule_options for what is its own"
                )
        return rule
    both = sorted(set(options) & {*_SHARED, "base"})
    if both:
        raise UsageError(
            f"rule_options has {', '.join(both)}, which the optimizer says ({type(optimizer).__name__}: "
            f"{', '.join(f'{k}={v!r}' for k, v in base.items())}); leave it out"
        )
    return make_rule("asgd" if rule is None else rule, base | options)


def _base_of(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Base step and hyper-parameters of a torch optimizer, as options of a rule.

    Raises:
        UsageError: another optimizer, or an option that no base step has.
    """
    kind, defaults = type(optimizer), optimizer.defaults
    bases: dict[type, str] = {
        optim.SGD: "sgd", optim.RMSprop: "rmsprop", optim.Adagrad: "adagrad", optim.Adam: "adam", optim.AdamW: "adamw",
    }  # fmt: skip
    if kind not in bases:
        raise UsageError(
            f"no rule has the step of {kind.__name__}; known are {', '.join(k.__name__ for k in bases)} of torch.optim and "
            "RuleOptimizer. Modes sync and kstep take any torch optimizer, without a rule"
        )
    base = bases[kind]
    if kind is optim.SGD and defaults["momentum"]:
        base = "nesterov" if defaults["nesterov"] else "momentum"
    if defaults.get("decoupled_weight_decay"):
        base = "adamw"
    if defaults.get("amsgrad"):
        if base == "adamw" and defaults["weight_decay"]:
            raise UsageError(f"{kind.__name__} with amsgrad=True and decoupled weight decay: no base step has both")
        base = "amsgrad"
    unknown = dict(_UNKNOWN, **({"momentum": 0} if kind is optim.RMSprop else {}))
    for group in [defaults, *optimizer.param_groups]:
        for name, nothing in unknown.items():
            if group.get(name, nothing) != nothing:
                raise UsageError(f"{kind.__name__} with {name}={group[name]!r}: no base step has it; expected {nothing!r}")
        if isinstance(group["lr"], torch.Tensor):
            raise UsageError(f"{kind.__name__} with a tensor as lr: expected a number")
    used = [n for n in _SHARED if n in defaults and base in OPTION_BASES.get(n, (base,))]
    return {"base": base, **{name: defaults[name] for name in used}}
