"""The training run: configuration, loop, evaluation, checkpoints, progress, records, tables and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcasync.train.config import TrainConfig, make_config, read_config

__all__ = ["TrainConfig", "make_config", "read_config"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``signals`` must be there before torch is."""
    if name in __all__:
        from hpcasync.train import config

        return getattr(config, name)
    raise AttributeError(f"module 'hpcasync.train' has no attribute {name!r}")
