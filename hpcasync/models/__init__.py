"""The built-in models by name, and any other by ``package.module:function``."""

from __future__ import annotations

from hpcasync.models.build import build, known

__all__ = ["build", "known"]
