"""Non-IID partitions: which worker holds which samples, by label shards, Dirichlet shares, a file, or at random."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcasync.data.dataset import Dataset
from hpcasync.data.partition import check_number, shard
from hpcasync.errors import UsageError

Indices = NDArray[np.int64]

FORMS = "iid, shards:C (C classes per worker), dirichlet:ALPHA, natural, or file:PATH"
_DRAWS = 100  # a Dirichlet draw that leaves a worker empty is drawn again, as in NIID-Bench


def make_partition(
    spec: str,
    labels: Any,
    workers: int,
    seed: int = 0,
    *,
    split: str = "train",
    batch: int | None = None,
) -> list[Indices]:
    """Deal the samples to ``workers``: one array of indices per worker, no sample twice, every worker some.

    - ``iid``: at random, shares that differ by at most one sample.
    - ``shards:C``: every worker has at most C classes, and exactly C where no class holds more than 1/C of the samples.
    - ``dirichlet:A``: each class is split among the workers with shares drawn from a Dirichlet distribution whose
      parameters are all A; small A is far from IID.
    - ``natural``: by the array ``train/part`` of the data set, the group (writer, hospital) of every sample.
    - ``file:PATH``: what `save_partition` wrote, index arrays in npz, or an array of groups; see `load_partition`.

    The first four use every sample. The same arguments give the same partition on every rank and machine.

    Args:
        spec: one of the forms above.
        labels: the class of every sample, integers ``(N,)``, or an open `Dataset`, which ``natural`` needs, and with which
            a file made for other data is refused.
        workers: the number of workers.
        seed: of the draw, from 0.
        split: of a `Dataset`.
        batch: refuse a partition in which some worker has fewer samples than this.

    Returns:
        Per worker int64 ``(n_i,)``, ascending.

    Raises:
        UsageError: a spec that does not parse, more classes per worker than classes, A <= 0, a worker without samples,
            a file that does not fit.

    Source: label shards after McMahan et al., AISTATS 2017, cut at the borders of the classes; Dirichlet shares per class
    after Yurochkin et al., ICML 2019, and Hsu, Qi, Brown, arXiv 1909.06335.
    """
    dataset = labels if isinstance(labels, Dataset) else None
    labels = np.asarray(labels if dataset is None else dataset.array(f"{split}/y"))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"labels are {labels.dtype} {labels.shape}, expected whole numbers (N,), one per sample")
    workers = check_number("workers", workers, 1)
    seed = check_number("seed", seed, 0)
    kind, value = parse_spec(spec)
    if kind == "natural":
        if dataset is None:
            raise UsageError("partition 'natural' is kept in a data set; give the data set in place of labels, or file:PATH")
        kind, value = "file", str(dataset.path)
    if kind != "file" and len(labels) < workers:
        raise UsageError(
            f"partition {spec!r}: {len(labels)} samples for {workers} workers leave one empty; use at most {len(labels)}"
        )
    if kind == "file":
        from hpcasync.data.partition_file import load_partition

        checksum = None if dataset is None else dataset.header.checksum
        parts = load_partition(str(value), workers, len(labels), name=f"{split}/part", checksum=checksum)
    elif kind == "iid":
        parts = [shard(len(labels), r, workers, 0, seed) for r in range(workers)]
    else:
        maker: Callable[..., list[Indices]] = _shards if kind == "shards" else _dirichlet
        parts = maker(labels, workers, value, np.random.default_rng([seed, workers]))
    parts = [np.sort(p) for p in parts]
    check_parts(f"partition {spec!r}", parts, len(labels), batch)
    return parts


def parse_spec(spec: str) -> tuple[str, int | float | str | None]:
    """``"shards:2"`` as ``("shards", 2)``, and so on.

    Raises:
        UsageError: it does not parse, or the number is out of range.
    """
    kind, colon, rest = str(spec).partition(":")
    kind = kind.strip().lower()
    if kind == "file" and rest:
        return kind, rest
    if kind in ("iid", "natural") and not colon:
        return kind, None
    try:
        if kind == "shards":
            count = int(rest)
            if count < 1:
                raise UsageError(f"partition {spec!r}: expected at least 1 class per worker, such as shards:2")
            return kind, count
        if kind == "dirichlet":
            alpha = float(rest)
            if not 0 < alpha <= 1e6:
                raise UsageError(f"partition {spec!r}: expected ALPHA > 0 and at most 1e6, such as dirichlet:0.5")
            return kind, alpha
    except UsageError:
        raise
    except ValueError:
        pass
    raise UsageError(f"partition {spec!r}: expected {FORMS}")


def check_parts(where: str, parts: Sequence[Indices], samples: int, batch: int | None = None) -> None:
    """Refuse a partition with an empty worker, an index out of range, or a sample that is dealt twice.

    Args:
        where: the start of the message.
        parts: index arrays.
        samples: the number of samples.
        batch: the least number of samples of a worker, if any.

    Raises:
        UsageError: as above.
    """
    count = np.zeros(samples, np.int64)
    for worker, part in enumerate(parts):
        if len(part) == 0:
            raise UsageError(
                f"{where} leaves worker {worker} of {len(parts)} without samples; use fewer workers, more even shares, or "
                "another seed"
            )
        bad = part[(part < 0) | (part >= samples)]
        if len(bad):
            raise UsageError(f"{where}: worker {worker} has sample {bad[0]}, expected indices from 0 to {samples - 1}")
        np.add.at(count, part, 1)
    if count.max(initial=0) > 1:
        raise UsageError(f"{where}: sample {int(count.argmax())} is dealt {count.max()} times, expected at most once")
    if batch is not None:
        check_number("batch", batch, 1)
        least = min(range(len(parts)), key=lambda w: len(parts[w]))
        if len(parts[least]) < batch:
            raise UsageError(
                f"{where}: batch {batch} is larger than the share of worker {least}, {len(parts[least])} samples; use a "
                "batch of at most that, fewer workers, or more even shares"
            )


def _shards(labels: NDArray[Any], workers: int, per_worker: int, rng: np.random.Generator) -> list[Indices]:
    """``per_worker`` shards for each worker, each shard of one class.

    McMahan's equal cuts of the sorted samples run across the borders of classes, so that a worker may see up to twice as
    many classes as asked for. Here every class is cut by itself, into more shards the larger it is.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    spec = f"partition 'shards:{per_worker}'"
    if per_worker > len(classes):
        raise UsageError(f"{spec}: {per_worker} classes per worker, but the data have {len(classes)}; use at most that")
    total = workers * per_worker
    if total < len(classes):
        raise UsageError(
            f"{spec}: {workers} workers of {per_worker} classes see {total} of the {len(classes)} classes; use at least "
            f"{-(-len(classes) // workers)} classes per worker, or {-(-len(classes) // per_worker)} workers"
        )
    if total > len(labels):
        raise UsageError(f"{spec}: {total} shards for {len(labels)} samples leave one empty; use fewer workers or classes")
    counts = np.ones(len(classes), np.int64)
    heap = [(-float(n), k) for k, n in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(total - len(classes)):  # one more cut through the class with the largest shards
        k = heap[0][1]
        counts[k] += 1
        heapq.heapreplace(heap, (-sizes[k] / counts[k], k))
    room = np.full(workers, per_worker)
    parts: list[list[Indices]] = [[] for _ in range(workers)]
    for k in rng.permutation(len(classes)):
        pieces = np.array_split(rng.permutation(np.flatnonzero(labels == classes[k])), counts[k])
        while pieces:
            # The workers with the most room come first, ties at random: so nobody gets a class twice unless it must be.
            order = np.lexsort((rng.random(workers), -room))[: min(len(pieces), int((room > 0).sum()))]
            for worker in order:
                parts[worker].append(pieces.pop())
            room[order] -= 1
    return [np.concatenate(p).astype(np.int64, copy=False) for p in parts]


def _dirichlet(labels: NDArray[Any], workers: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    classes = np.unique(labels)
    for _ in range(_DRAWS):
        parts: list[list[Indices]] = [[] for _ in range(workers)]
        for k in classes:
            own = rng.permutation(np.flatnonzero(labels == k))
            cuts = np.rint(np.cumsum(rng.dirichlet(np.full(workers, alpha)))[:-1] * len(own)).astype(np.int64)
            for part, piece in zip(parts, np.split(own, np.minimum(cuts, len(own)))):
                part.append(piece)
        if all(sum(map(len, p)) for p in parts):
            return [np.concatenate(p).astype(np.int64, copy=False) for p in parts]
    raise UsageError(
        f"partition 'dirichlet:{alpha:g}' leaves a worker without samples in each of {_DRAWS} draws ({workers} workers, "
        f"{len(labels)} samples); use a larger ALPHA, fewer workers, or another seed"
    )
