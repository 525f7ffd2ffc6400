"""Staleness-aware asynchronous SGD: the staler the gradient, the smaller its step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpcasync.kernels import HYPER
from hpcasync.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class StalenessAware(Rule):
    """Divide the learning rate by the staleness of the gradient: ``eta / max(1, tau)``.

    ``tau`` is the shard's own. Decoupled weight decay (adamw) shrinks alike.

    Source: Zhang, Gupta, Lian, Liu, IJCAI 2016, equation of the modulated learning rate.
    """

    name: ClassVar[str] = "staleness-aware"
    paper: ClassVar[str] = "Zhang, Gupta, Lian, Liu, IJCAI 2016"

    def tune(self, hyper: np.ndarray, count: int, tau: int) -> np.ndarray:
        if tau <= 1:
            return hyper
        hyper = hyper.copy()
        hyper[HYPER["lr"]] /= tau
        return hyper

    def reference_group(self, group: Mapping[str, Any], count: int, tau: int) -> Mapping[str, Any]:
        return {**group, "lr": group["lr"] / max(1, tau)}
