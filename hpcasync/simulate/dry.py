"""The dry simulation: no gradients, only who pushes when: throughput, queueing and staleness of thousands of workers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import njit
from rich.table import Table

from hpcasync.errors import UsageError
from hpcasync.simulate.cluster import Cluster
from hpcasync.simulate.config import SimulateConfig
from hpcasync.stats import Staleness
from hpcasync.store import make_layout

_STREAM = 7  # of the random numbers, beside the seed


@njit(cache=True)
def _before(times: np.ndarray, heap: np.ndarray, a: int, b: int) -> bool:
    """Whether the heap's entry ``a`` comes before ``b``: by arrival, then by worker."""
    ta, tb = times[heap[a]], times[heap[b]]
    return bool(ta < tb or (ta == tb and heap[a] < heap[b]))


@njit(cache=True)
def _push(times: np.ndarray, heap: np.ndarray, size: int, worker: int) -> int:
    heap[size] = worker
    child = size
    while child > 0:
        parent = (child - 1) // 2
        if not _before(times, heap, child, parent):
            break
        heap[child], heap[parent] = heap[parent], heap[child]
        child = parent
    return size + 1


@njit(cache=True)
def _pop(times: np.ndarray, heap: np.ndarray, size: int) -> int:
    size -= 1
    heap[0] = heap[size]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        if child + 1 < size and _before(times, heap, child + 1, child):
            child += 1
        if not _before(times, heap, child, parent):
            break
        heap[child], heap[parent] = heap[parent], heap[child]
        parent = child
    return size


@njit(cache=True)
def loop(
    drawn: np.ndarray, slow: np.ndarray, transfer: float, service: float, shards: int, bound: int, updates: int
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, float, float]:
    """The event loop over ``updates`` pushes.

    Args:
        drawn: float64 (workers + updates,), step times in the order of their use.
        slow: float64 (workers,), factors on them.
        transfer: seconds of a push or a pull.
        service: seconds that the store takes for one push.
        shards: pushes that it works on at a time.
        bound: of staleness in pushes, negative for none.
        updates: pushes in all.

    Returns:
        The time of the last push, staleness of every push, pushes per worker, seconds that every push queued,
        compute seconds in all, and seconds that workers waited at the bound.
    """
    workers = slow.size
    times = np.empty(workers)
    read = np.zeros(workers, np.int64)
    clocks = np.zeros(workers, np.int64)
    heap = np.empty(workers + 1, np.int64)
    free = np.zeros(shards)
    at_clock = np.zeros(updates + 2, np.int64)  # workers with so many pushes
    at_clock[0] = workers
    slowest = 0
    gated = np.empty(workers, np.int64)
    gates = 0
    size, used = 0, 0
    computed, waited = 0.0, 0.0
    for i in range(workers):
        seconds = drawn[used] * slow[i]
        used += 1
        computed += seconds
        times[i] = transfer + seconds + transfer
        size = _push(times, heap, size, i)
    stale = np.empty(updates, np.int64)
    queued = np.zeros(updates)
    now = 0.0
    for version in range(updates):
        i = heap[0]
        now = times[i]
        size = _pop(times, heap, size)
        stale[version] = version - read[i]
        read[i] = version + 1
        done = now
        if service > 0.0:  # as many pushes at a time as there are shards, each in another one
            slot = free.argmin()
            begin = max(now, free[slot])
            queued[version] = begin - now
            done = begin + service
            free[slot] = done
        at_clock[clocks[i]] -= 1
        clocks[i] += 1
        at_clock[clocks[i]] += 1
        moved = False
        while at_clock[slowest] == 0:
            slowest += 1
            moved = True
        if bound >= 0 and clocks[i] - slowest > bound:
            gated[gates] = i
            gates += 1
            times[i] = now
        else:
            seconds = drawn[used] * slow[i]
            used += 1
            computed += seconds
            times[i] = done + transfer + seconds + transfer
            size = _push(times, heap, size, i)
        if moved:  # a gated worker is one ahead of the bound: all go on, and read again
            gated[:gates].sort()
            for g in range(gates):
                j = gated[g]
                waited += now - times[j]
                read[j] = version + 1
                seconds = drawn[used] * slow[j]
                used += 1
                computed += seconds
                times[j] = now + transfer + seconds + transfer
                size = _push(times, heap, size, j)
            gates = 0
    return now, stale, clocks, queued, computed, waited


def dry_run(config: SimulateConfig) -> dict[str, Any]:
    """Simulate ``config.updates`` pushes without gradients; returns the object that ``--json`` prints.

    Raises:
        UsageError: workers that fail or join, or a delay, which only a full simulation has.
    """
    if config.fail or config.join:
        raise UsageError("--dry does not go with --fail and --join; leave out --dry")
    if config.delay:
        raise UsageError("--dry does not go with --delay, which is about gradients; leave out one of them")
    began = time.perf_counter()
    cluster = config.cluster
    workers = config.workers
    updates = 100 * workers if config.updates is None else config.updates
    sizes = [config.parameters] if config.parameters is not None else _sizes(config)
    layout = make_layout(sizes)
    service, shards = 4 * layout.total / cluster.service, len(layout.shards)
    slow = np.array(cluster.slow)
    bound = -1 if config.staleness is None else config.staleness
    transfer = cluster.network.transfer(4 * sum(sizes))
    drawn, slow = _draw(cluster, slow, config.seed, workers + updates)
    seconds, stale, pushes, queued, computed, waited = loop(drawn, slow, transfer, service, shards, bound, updates)
    return {
        "updates_per_second": updates / seconds if seconds else 0.0,
        "samples_per_second": config.batch * updates / seconds if seconds else 0.0,
        "virtual_seconds": seconds,
        "wall_seconds": time.perf_counter() - began,
        "updates": updates,
        "workers": workers,
        "parameters": sum(sizes),
        "shards": shards,
        "seed": config.seed,
        "staleness": Staleness(np.bincount(stale)).summary(),
        "queue_seconds": {"mean": float(queued.mean()), "p95": float(np.quantile(queued, 0.95)), "max": float(queued.max())},
        "store_busy": min(1.0, service * updates / shards / seconds) if seconds else 0.0,
        "waited_share": waited / (seconds * workers) if seconds else 0.0,
        "compute_share": min(1.0, computed / (seconds * workers)) if seconds else 0.0,
        "pushes_per_worker": {"min": int(pushes.min()), "max": int(pushes.max())},
    }


def dry_table(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(title="Dry simulation", show_header=False)
    stale, queue, pushes = result["staleness"], result["queue_seconds"], result["pushes_per_worker"]
    rows = {
        "workers": f"{result['workers']:,}",
        "updates": f"{result['updates']:,} of {result['parameters']:,} parameters in {result['shards']} shard(s)",
        "virtual seconds": f"{result['virtual_seconds']:,.4g}, simulated in {result['wall_seconds']:,.1f} s",
        "updates/s, samples/s": f"{result['updates_per_second']:,.4g}, {result['samples_per_second']:,.4g}",
        "staleness mean, 50 %, 95 %, max": f"{stale['mean']:,.1f}, {stale['p50']:,}, {stale['p95']:,}, {stale['max']:,}",
        "queue mean, 95 %, max": ", ".join(f"{queue[k]:.3g} s" for k in ("mean", "p95", "max")),
        "store busy": f"{100 * result['store_busy']:.1f} % of the time",
        "waiting at the bound": f"{100 * result['waited_share']:.1f} % of the workers' time",
        "pushes per worker": f"{pushes['min']:,} to {pushes['max']:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sizes(config: SimulateConfig) -> list[int]:
    """The sizes of the model's parameters."""
    from hpcasync import models
    from hpcasync.data import open_dataset

    dataset = open_dataset(config.data)
    return [p.numel() for p in models.build(config.model, dataset.shape, dataset.classes).parameters()]


def _draw(cluster: Cluster, slow: np.ndarray, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Step times in the order of their use, and the workers' factors; several kinds differ by their mean."""
    rng = np.random.default_rng([seed, _STREAM])
    kinds = cluster.compute
    drawn = kinds[0].sample(rng, count)
    if len(kinds) > 1:
        means = np.array([kinds[i % len(kinds)].mean for i in range(cluster.workers)])
        return drawn, slow * means / kinds[0].mean
    return drawn, slow
