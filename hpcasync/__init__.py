"""hpcasync: asynchronous, synchronous and K-step data-parallel training of torch models over MPI.

Importing this package neither initialises nor needs MPI; ``init()`` does the first where the second is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpcasync import data, lightning, models, rules
    from hpcasync.comm import World, init
    from hpcasync.errors import UsageError
    from hpcasync.modes import Async, Guided, Hierarchical, KStep, Sync
    from hpcasync.train.checkpoint import load_checkpoint, save_checkpoint
    from hpcasync.train.monitor import Monitor
    from hpcasync.train.stall import StallWatch

_HOMES = {
    "Async": "hpcasync.modes",
    "Guided": "hpcasync.modes",
    "Hierarchical": "hpcasync.modes",
    "KStep": "hpcasync.modes",
    "Monitor": "hpcasync.train.monitor",
    "StallWatch": "hpcasync.train.stall",
    "Sync": "hpcasync.modes",
    "UsageError": "hpcasync.errors",
    "World": "hpcasync.comm",
    "init": "hpcasync.comm",
    "load_checkpoint": "hpcasync.train.checkpoint",
    "save_checkpoint": "hpcasync.train.checkpoint",
}
_MODULES = ("data", "lightning", "models", "rules")

__all__ = [
    "Async", "Guided", "Hierarchical", "KStep", "Monitor", "StallWatch", "Sync", "UsageError", "World", "data", "init",
    "lightning", "load_checkpoint", "models", "rules", "save_checkpoint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: ``hpcasync --help`` must not pay for torch."""
    if name in _MODULES:
        return importlib.import_module(f"hpcasync.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hpcasync' has no attribute {name!r}")
