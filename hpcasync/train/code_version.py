"""Which code a run's bits depend on: a digest of the package's own, the model's file, and the libraries' versions."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

import numba
import numpy as np
import torch

import hpcasync

PARTS = ("kernels", "rules", "store", "models")
"""The packages that decide the bits of an update and of a built-in model's gradient."""


def code_version(model: str) -> dict[str, str]:
    """What must be the same for a replay to find the same bits: ``hpcasync``, ``torch``, ``numpy``, ``numba``, ``model``.

    Args:
        model: as in the configuration; it has been built.
    """
    libraries = {"torch": torch.__version__, "numpy": np.__version__, "numba": numba.__version__}
    return {"hpcasync": _package(), "model": _source(model), **libraries}


@cache
def _package() -> str:
    root = Path(hpcasync.__file__).parent
    total = hashlib.sha256()
    for path in sorted(p for part in PARTS for p in (root / part).rglob("*.py")):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return f"{hpcasync.__version__}+{total.hexdigest()[:16]}"


def _source(model: str) -> str:
    """The model's name, with the digest of its module's file if it is the user's own."""
    module = sys.modules.get(model.partition(":")[0])
    path = getattr(module, "__file__", None) if ":" in model else None
    return model if path is None else f"{model}+{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
