"""A toy problem for stores, and the sequential reference that a store must equal."""

from __future__ import annotations

import numpy as np

from hpcasync.rules import Rule, TrendSmooth
from hpcasync.store import Layout, make_layout

SIZES = (5, 700, 1, 33, 260)


def small_layout(shard: int = 128) -> Layout:
    return make_layout(SIZES, shard)


def rule() -> Rule:
    return TrendSmooth(base="adam", lr=0.05, weight_decay=0.01)


def start() -> np.ndarray:
    """Flat parameters; zeros in the gaps."""
    layout = small_layout()
    w = np.zeros(layout.total, np.float32)
    rng = np.random.default_rng(0)
    for begin, size in zip(layout.starts, layout.sizes):
        w[begin : begin + size] = rng.standard_normal(size)
    return w


def gradient(step: int, worker: int, out: np.ndarray) -> list[np.ndarray]:
    """A gradient that depends on what the worker read, so that a wrong read shows."""
    rng = np.random.default_rng([step, worker])
    layout = small_layout()
    views = [out[b : b + s] for b, s in zip(layout.starts, layout.sizes)]
    return [(0.3 * v + rng.standard_normal(v.size)).astype(np.float32) for v in views]


def sequential(turns: list[tuple[int, int]], workers: int, taus: dict[tuple[int, int], int]) -> np.ndarray:
    """Every worker's model after the last turn, from the numpy reference alone, each parameter on its own.

    Args:
        turns: (step, worker) in order of arrival.
        workers: how many.
        taus: staleness of each turn.
    """
    layout, the_rule = small_layout(), rule()
    group = the_rule.group_options()
    w = start()
    states = []
    for begin, size in zip(layout.starts, layout.sizes):
        vectors = {v.name: np.full(size, v.start, np.float32) for v in the_rule.vectors}
        states.append({"w": w[begin : begin + size].copy(), **vectors})
    copies = np.repeat(w[None], workers, 0)
    for count, (step, worker) in enumerate(turns, start=1):
        for k, grad in enumerate(gradient(step, worker, copies[worker])):
            the_rule.reference(states[k], grad, group, count, taus[step, worker])
        for begin, size, state in zip(layout.starts, layout.sizes, states):
            copies[worker, begin : begin + size] = state["w"]
    return copies
