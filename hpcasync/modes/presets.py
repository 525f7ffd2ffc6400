"""The published methods that are settings of ``KStep``, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcasync.errors import UsageError, unknown


@dataclass(frozen=True)
class Preset:
    """Settings under one name.

    Attributes:
        line: what it is.
        paper: where it comes from.
        options: of ``KStep``; the others keep their defaults.
        fixed: options without which it would be another method; they cannot be overridden.
        rule: options of the local optimizer, for the command line.
    """

    line: str
    paper: str
    options: Mapping[str, Any]
    fixed: tuple[str, ...] = ()
    rule: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {
    "k-avg": Preset(
        "average the models after every K local steps (local SGD)",
        "Zhou, Cong, IJCAI 2018; Stich, ICLR 2019",
        {"block_momentum": 0.0, "block_lr": 1.0, "nesterov": False, "warm_start": 0},
        fixed=("block_momentum", "block_lr", "nesterov", "warm_start"),
    ),
    "m-avg": Preset(
        "k-avg with momentum of the block steps; mu 0.5 is ours, to be tuned with K and P",
        "Cong, Liu, MLHPC 2020, doi 10.1109/MLHPCAI4S51975.2020.00011",
        {"block_momentum": 0.5, "block_lr": 1.0},
    ),
    "post-local": Preset(
        "synchronous SGD for warm_start steps, then k-avg; 100 steps are ours (the paper: until the first decay of lr)",
        "Lin, Stich, Patel, Jaggi, ICLR 2020, arXiv 1808.07217",
        {"block_momentum": 0.0, "block_lr": 1.0, "warm_start": 100},
        fixed=("block_momentum",),
    ),
    "bmuf": Preset(
        "blockwise model-update filtering: block momentum 1 - 1/P, local momentum reset as in CNTK; nesterov on request",
        "Chen, Huo, ICASSP 2016, doi 10.1109/ICASSP.2016.7472805",
        {"block_momentum": "1-1/P", "block_lr": 1.0, "inner_state": "reset"},
    ),
    "slowmo": Preset(
        "slow momentum 0.6 (the paper: by task), local state reset (its other choice: keep); constant lr",
        "Wang, Tantia, Ballas, Rabbat, ICLR 2020, arXiv 1910.00643",
        {"every": 12, "block_momentum": 0.6, "block_lr": 1.0, "inner_state": "reset"},
    ),
    "diloco": Preset(
        "AdamW inside, Nesterov momentum 0.9 and learning rate 0.7 outside; the paper has K = 500",
        "Douillard et al. 2023, arXiv 2311.08105",
        {"every": 50, "block_momentum": 0.9, "nesterov": True, "block_lr": 0.7, "inner_state": "keep"},
        rule={"base": "adamw"},
    ),
}
"""Every preset by its name on the command line."""


def preset_options(name: str, ranks: int, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of ``KStep`` that the preset ``name`` sets, with those of ``overrides`` in their place.

    Args:
        name: a key of ``PRESETS``.
        ranks: P, for block momentum 1 - 1/P.
        overrides: other values; None keeps the preset's.

    Raises:
        UsageError: an unknown name, or an override that makes it another method.
    """
    if name not in PRESETS:
        raise unknown("preset", str(name), PRESETS)
    preset = PRESETS[name]
    options = dict(preset.options)
    if options["block_momentum"] == "1-1/P":
        options["block_momentum"] = 1 - 1 / ranks
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    for key in preset.fixed:
        if given.get(key, options[key]) != options[key]:
            raise UsageError(
                f"preset {name} with {key}={given[key]!r}: by definition it has {options[key]!r}; leave one of them out"
            )
    return options | given
