"""What a method does inside, in a few numbers, for the rows of a run: measured now and then, not at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcasync.rules import TrendSmooth
from hpcasync.store import Layout

if TYPE_CHECKING:
    from hpcasync.store import Store
    from hpcasync.store.worker import Worker

QUANTILES = {"lowest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "highest": 1.0}


def shrink_shares(
    store: Store,
    worker: Worker,
    grads: Sequence[np.ndarray | None],
    hypers: Sequence[np.ndarray],
    layers: Layout,
    names: Sequence[str],
) -> dict[str, float]:
    """Per parameter, the part of the base's step that `TrendSmooth` takes away from a gradient which is about to be pushed.

    Nothing is pushed: the shared state is copied, one version per shard.

    Args:
        store: its rule is a `TrendSmooth`.
        worker: who will push.
        grads, hypers: as for ``Store.push_pull``.
        layers: where each parameter lies; of as many elements as the store's layout, which may know it as one piece.
        names: of the parameters.
    """
    rule = store.rule
    assert isinstance(rule, TrendSmooth)
    state, versions = store.snapshot(worker), store.shard_versions()
    starts = np.array([shard.start for shard in store.layout.shards])
    shares = {}
    for name, start, size in zip(names, layers.starts, layers.sizes, strict=True):
        part = int(np.searchsorted(store.layout.starts, start, side="right")) - 1
        grad, k = grads[part], int(np.searchsorted(starts, start, side="right")) - 1
        if grad is not None and size:
            first = start - store.layout.starts[part]
            count, tau = versions[k] + 1, versions[k] - int(worker.read[k])
            rows = state[:, start : start + size]
            shares[name] = rule.shrink_share(rows, grad[first : first + size], hypers[part], count, tau)
    return shares


def layer_norms(values: np.ndarray, layers: Layout, names: Sequence[str]) -> dict[str, float]:
    """Euclidean norm of each parameter's part of a flat vector."""
    parts = zip(names, layers.starts, layers.sizes, strict=True)
    return {name: float(np.linalg.norm(values[start : start + size])) for name, start, size in parts}


def spread(values: Iterable[float]) -> dict[str, float]:
    """The ``QUANTILES`` of the finite ones among ``values``; nothing where there is none."""
    found = np.array(list(values), np.float64)
    found = found[np.isfinite(found)]
    return {name: float(np.quantile(found, q)) for name, q in QUANTILES.items()} if found.size else {}
