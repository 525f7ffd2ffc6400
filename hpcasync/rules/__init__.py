"""The update rules, one file each, and the registry that the command line reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hpcasync.errors import UsageError, unknown
from hpcasync.rules.apam import APAM
from hpcasync.rules.asgd import ASGD, Plain
from hpcasync.rules.base import Rule, Vector
from hpcasync.rules.dc_asgd import DCASGD
from hpcasync.rules.easgd import EAMSGD, EASGD
from hpcasync.rules.gsgm import GSGM
from hpcasync.rules.hogwild import Hogwild
from hpcasync.rules.staleness_aware import StalenessAware
from hpcasync.rules.trend_smooth import TrendSmooth

RULES: dict[str, type[Rule]] = {
    "asgd": ASGD,
    "plain": Plain,
    "trend-smooth": TrendSmooth,
    "staleness-aware": StalenessAware,
    "dc-asgd": DCASGD,
    "hogwild": Hogwild,
    "easgd": EASGD,
    "eamsgd": EAMSGD,
    "apam": APAM,
    "gsgm": GSGM,
}
"""Every rule by its name on the command line: a new rule is one file and one line here."""


def options_of(name: str) -> dict[str, Any]:
    """The options of a rule with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(_find(name))}


def make_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """Build a rule by its name.

    Args:
        name: a key of ``RULES``.
        options: its options; ``None`` values mean the default.

    Raises:
        UsageError: unknown rule, an option that the rule does not have, a value out of range.
    """
    known = options_of(name)
    given = {k: v for k, v in (options or {}).items() if v is not None}
    for key in given:
        if key not in known:
            raise UsageError(f"rule {name!r} has no option {key!r}. It has: {', '.join(known)}.")
    return _find(name)(**given)


def _find(name: str) -> type[Rule]:
    if name not in RULES:
        raise unknown("rule", name, RULES)
    return RULES[name]


__all__ = ["APAM", "ASGD", "DCASGD", "EAMSGD", "EASGD", "GSGM", "Hogwild", "Plain", "StalenessAware", "TrendSmooth"]
__all__ += ["RULES", "Rule", "Vector", "make_rule", "options_of"]
