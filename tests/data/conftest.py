"""Fixtures: a data set file, a cache of its own for every test, and the real public files where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcasync.data import write_dataset

from .helpers import arrays

REAL = os.environ.get("HPCASYNC_DATA")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test may see or change the user's cache, nor depend on where the user's data lie."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HPCASYNC_CACHE", str(cache))
    monkeypatch.delenv("HPCASYNC_DATA", raising=False)
    return cache


@pytest.fixture
def small(tmp_path):
    """A valid data set file: 50 and 20 images of 1 x 6 x 5 in three classes."""
    return write_dataset(tmp_path / "small.h5", arrays())


@pytest.fixture
def real_data(monkeypatch):
    """The folder of the real public files."""
    if not REAL or not (Path(REAL) / "mnist").is_dir():
        pytest.skip("HPCASYNC_DATA names no folder with mnist/")
    monkeypatch.setenv("HPCASYNC_DATA", REAL)
    return Path(REAL)
