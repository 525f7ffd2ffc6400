"""The toy data set, written once."""

from __future__ import annotations

import pytest

from hpcasync.data import Dataset
from tests.simulate import toys


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toys.dataset(tmp_path_factory.mktemp("toy"))
