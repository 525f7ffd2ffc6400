"""Every rule with workers that take turns, from the numpy references alone: what the stores must equal."""

from __future__ import annotations

import numpy as np

from hpcasync.rules import APAM, ASGD, DCASGD, EAMSGD, EASGD, GSGM, Hogwild, Rule, StalenessAware, TrendSmooth
from tests.store.helpers import gradient, small_layout, start

RULES: list[Rule] = [
    ASGD(base="ema", lr=0.1),
    TrendSmooth(base="adam", lr=0.05, weight_decay=0.01),
    StalenessAware(base="momentum", lr=0.1, weight_decay=0.01),
    StalenessAware(base="adamw", lr=0.1, weight_decay=0.01),
    DCASGD(lr=0.1, compensation=0.5, weight_decay=0.01),
    DCASGD(lr=0.1, adaptive=True, base="momentum"),
    Hogwild(lr=0.1),
    APAM(lr=0.05),
    APAM(lr=0.05, style="paper", step_size="sqrt", low=-0.5, high=0.75, weight_decay=0.01),
    EASGD(lr=0.1, period=2),
    EASGD(lr=0.1, period=3, moving_rate=0.25, base="adam", weight_decay=0.01),
    EAMSGD(lr=0.1, period=1),
    GSGM(lr=0.1),
    GSGM(lr=0.1, base="momentum", weight_decay=0.01),
    GSGM(lr=0.1, base="adam", average="round"),
    GSGM(lr=0.1, base="rmsprop", window=2),
    GSGM(lr=0.1, base="adamw", average="groups", weight_decay=0.01),
    GSGM(lr=0.1, average="groups", window=2),
    GSGM(lr=0.1, window=1),
]

STEPS = 6


def turns_of(workers: int) -> list[tuple[int, int]]:
    """(step, worker): each worker once per step, in another order each time."""
    rng = np.random.default_rng(3)
    return [(step, int(worker)) for step in range(STEPS) for worker in rng.permutation(workers)]


def fits(rule: Rule, workers: int) -> bool:
    """Whether the rule's options fit the number of workers."""
    return (getattr(rule, "window", None) or 1) <= workers


def replay(rule: Rule, turns: list[tuple[int, int]], workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Every worker's model after the last turn, and the shared one; each parameter on its own."""
    layout, rule = small_layout(), rule.bind(workers)
    group = rule.group_options()
    w = start()
    places = list(zip(layout.starts, layout.sizes))
    states, owns = [], []
    for begin, size in places:
        part = w[begin : begin + size]
        states.append({"w": part, **{v.name: np.full(size, v.start, np.float32) for v in rule.vectors}})
        private = {v.name: np.zeros(size, np.float32) for v in rule.private_vectors}
        owns.append([{"w": part, **private} for _ in range(workers)])
    copies = np.repeat(w[None], workers, 0)
    read = [0] * workers
    for done, (step, worker) in enumerate(turns):
        count, tau = done + 1, done - read[worker]
        arrival = len({k for _, k in turns[: done + 1]})
        if rule.own_copy:
            count, arrival = step + 1, int(step % rule.every == 0)
        elif isinstance(rule, GSGM) and rule.average == "round":
            arrival = sum(s == step for s, _ in turns[: done + 1])
        elif isinstance(rule, GSGM) and rule.average == "groups":
            arrival = done % rule.size + 1
        for k, grad in enumerate(gradient(step, worker, copies[worker])):
            own = owns[k][worker]
            rule.reference(states[k], grad, group, count, tau, own=own, arrival=arrival)
            begin, size = places[k]
            copies[worker, begin : begin + size] = own["w"]
        read[worker] = done + 1
    for (begin, size), state in zip(places, states):
        w[begin : begin + size] = state["w"]
    return copies, w
