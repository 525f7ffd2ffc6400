"""Small real data sets cut by seed: the UCI sets that scikit-learn carries, and a part of MNIST, in hpcasync's own layout.

scikit-learn only gives the arrays: they go through an npz file and ``import_dataset`` into the cache, as any user's data would.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

TEST, VALIDATION = 0.4, 0.25
"""Parts held back: of all samples for the test, and of the training part for the choice of learning rates."""
MNIST_SAMPLES = 3000
SOURCES = {
    "breast-cancer": "Breast Cancer Wisconsin (Diagnostic), Wolberg, Mangasarian, Street & Street 1995, UCI, CC BY 4.0",
    "wine": "Wine, Aeberhard & Forina 1992, UCI, CC BY 4.0",
    "uci-digits": "Optical Recognition of Handwritten Digits (test part), Alpaydin & Kaynak 1998, UCI, CC BY 4.0",
    "mnist-part": f"MNIST, LeCun, Cortes & Burges 1998, the first {MNIST_SAMPLES} training samples",
}


def pool(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All samples and labels of a set."""
    if name == "mnist-part":
        from hpcasync.data import open_dataset

        full = open_dataset("mnist")
        return full.array("train/x")[:MNIST_SAMPLES], full.array("train/y")[:MNIST_SAMPLES]
    try:
        from sklearn.datasets import load_breast_cancer, load_digits, load_wine
    except ImportError as error:
        raise SystemExit(f"{name} comes from scikit-learn ({error}): pip install -c constraints.txt -e '.[bench]'") from error

    load = {"breast-cancer": load_breast_cancer, "wine": load_wine, "uci-digits": load_digits}[name]
    x, y = load(return_X_y=True)
    return x.astype(np.float32), y.astype(np.int64)


def cut(name: str, part: str, seed: int) -> Path:
    """A set cut 60/40 by ``seed``, class by class; kept in the cache. It is normalised with statistics of its training part.

    Args:
        name: of ``SOURCES``.
        part: ``"test"``: 60 % to train on, 40 % to test; ``"validation"``: the same 60 % cut once more, so that its "test" part
            holds nothing of the final one.
        seed: of the cuts.
    """
    from hpcasync.data import import_dataset
    from hpcasync.data.resolve import cache_folder

    path = cache_folder() / "pools" / f"{name}-{part}-{seed}.h5"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        npz, whole = Path(folder) / f"{name}.npz", Path(folder) / f"{name}.h5"
        x, y = pool(name)
        np.savez(npz, x=x, y=y)
        final = {"name": path.stem, "source": SOURCES[name], "overwrite": True}
        if part == "test":
            return import_dataset(npz, path, test_fraction=TEST, seed=seed, **final)
        from hpcasync.data import open_dataset

        first = open_dataset(import_dataset(npz, whole, test_fraction=TEST, seed=seed))
        np.savez(npz, x=first.array("train/x"), y=first.array("train/y"))
        return import_dataset(npz, path, test_fraction=VALIDATION, seed=seed, **final)
