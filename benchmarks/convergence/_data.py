"""The recipes' data: a cut of a data set, and Dirichlet partitions in which every worker has a batch; kept in the cache."""

from __future__ import annotations

from pathlib import Path

from hpcasync.data import Arrays, make_partition, open_dataset, save_partition, write_dataset
from hpcasync.data.resolve import cache_folder

_DRAWS = 1000  # seeds of a partition that are tried


def cut(data: str, samples: int, test_samples: int | None) -> Path:
    """The data set with only its first samples of the training and of the test set.

    MNIST and Fashion-MNIST come shuffled, so their first samples hold all classes.
    """
    path = cache_folder() / f"{data}-first-{samples}-{test_samples or 'all'}.h5"
    if not path.exists():
        full = open_dataset(data)
        sizes = {"train": samples, "test": test_samples}
        arrays = {f"{split}_{k}": full.array(f"{split}/{k}")[:size] for split, size in sizes.items() for k in "xy"}
        # overwrite: another process may have been faster; the bytes are the same
        write_dataset(path, Arrays(**arrays, name=path.stem, classes=full.classes, source=full.header.source), overwrite=True)
    return path


def deal(spec: str, data: str, workers: int, seed: int, batch: int) -> str:
    """The partition ``spec`` of the first seed, from ``1000 * seed`` on, that leaves every worker at least a batch.

    A Dirichlet draw with small alpha often leaves a worker next to nothing; NIID-Bench draws again too.

    Returns:
        The partition as ``file:PATH``.
    """
    dataset = open_dataset(data)
    path = cache_folder() / f"{dataset.name}-{spec.replace(':', '-')}-{workers}-{seed}-{batch}.h5"
    if not path.exists():
        draws = (make_partition(spec, dataset, workers, 1000 * seed + i) for i in range(_DRAWS))
        parts = next(parts for parts in draws if min(map(len, parts)) >= batch)
        save_partition(path, parts, len(dataset.array("train/y")), checksum=dataset.header.checksum, spec=spec)
    return f"file:{path}"
