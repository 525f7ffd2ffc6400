"""Artificial delay: a worker reads a version that others have already overwritten."""

from __future__ import annotations

import numpy as np

from hpcasync.store import LocalStore, Worker

_STREAM = 11  # of the random numbers, beside the seed


class Delay:
    """The last versions of the shared parameters, of which every read takes one at random.

    With one worker the staleness is uniform on 0 .. ``most`` (fewer while there are fewer versions): the experiment of APAM's
    authors. With several it comes on top of that of the asynchrony.

    Args:
        store: whose versions; each push counts as one.
        most: versions that a read may lie behind the newest, >= 1.
        seed: of the run.

    Source: Xu et al. 2023, the authors' code, ``cifar10_allcnn_artifical_maxdelay.py``: the gradient is taken at one of the
    last N models, drawn uniformly.
    """

    def __init__(self, store: LocalStore, most: int, seed: int) -> None:
        self._store = store
        self._ring = np.empty((most + 1, store.layout.total), np.float32)
        self._rng = np.random.default_rng([seed, _STREAM])
        self._kept = 0
        self.keep()

    def keep(self) -> None:
        """The shared parameters are a new version."""
        self._ring[self._kept % len(self._ring)] = self._store.state[0]
        self._kept += 1

    def age(self, worker: Worker, out: np.ndarray) -> None:
        """Replace what the worker has just read, the newest version in ``out``, by an older one."""
        back = int(self._rng.integers(min(self._kept, len(self._ring))))
        out[:] = self._ring[(self._kept - 1 - back) % len(self._ring)]
        worker.read -= back
