"""Lightning: ``Trainer(strategy=hpcasync.lightning.HPCAsyncStrategy("async"))``, started with mpiexec.

Importing this package does not need Lightning; asking for the strategy does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hpcasync.errors import UsageError

if TYPE_CHECKING:
    from hpcasync.lightning.strategy import HPCAsyncStrategy

__all__ = ["HPCAsyncStrategy"]


def __getattr__(name: str) -> Any:
    if name != "HPCAsyncStrategy":
        raise AttributeError(f"module 'hpcasync.lightning' has no attribute {name!r}")
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"hpcasync.lightning needs the package lightning, which can't be imported in {sys.prefix} ({error}): "
            "pip install 'hpcasync[lightning]'"
        ) from error
    from hpcasync.lightning.strategy import HPCAsyncStrategy

    return HPCAsyncStrategy
