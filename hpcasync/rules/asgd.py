"""Plain asynchronous SGD, with any base step: every gradient is applied as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hpcasync.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class ASGD(Rule):
    """Asynchronous SGD: each gradient is applied as it comes, however stale (the baseline)."""

    name: ClassVar[str] = "asgd"
    paper: ClassVar[str] = "Dean et al., NIPS 2012 (Downpour SGD)"
