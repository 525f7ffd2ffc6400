"""Hogwild: asynchronous SGD without locks, which loses updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hpcasync.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class Hogwild(Rule):
    """Asynchronous SGD without locks: LOSES UPDATES of workers that meet in a shard, and reads may be torn.

    Everything else is as in ``asgd``. The shards' versions, and so the staleness and Adam's bias correction, are only
    approximate, since they are counted without a lock too. An element is never torn: a 4-byte store is whole.

    Source: Niu, Recht, Re, Wright, NIPS 2011 (the paper is about sparse gradients; dense ones meet far more often).
    """

    name: ClassVar[str] = "hogwild"
    paper: ClassVar[str] = "Niu, Recht, Re, Wright, NIPS 2011 (no locks: loses updates)"
    lock_free: ClassVar[bool] = True
