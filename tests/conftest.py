"""Fixtures every test may use: the MPI lanes, `mpirun`, and a cache folder that is never the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Hosts, HostsRun, missing
from tests.mpi import LANES, Lane, MpiRun, require_lane


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may read or fill the user's real cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCASYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> Lane:
    """Each MPI library in turn; one only: `@pytest.mark.parametrize("lane", ["mpich"], indirect=True)`."""
    return require_lane(request.param)


@pytest.fixture
def mpirun(lane: Lane, tmp_path: Path) -> MpiRun:
    """Runs code, a script or the hpcasync command on n ranks: see `tests.mpi.MpiRun`."""
    return MpiRun(lane, tmp_path)


def _hosts(count: int) -> Iterator[Hosts]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(count) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def _two() -> Iterator[Hosts]:
    yield from _hosts(2)


@pytest.fixture(scope="session")
def _four() -> Iterator[Hosts]:
    yield from _hosts(4)


@pytest.fixture
def two_hosts(lane: Lane, tmp_path: Path, _two: Hosts) -> HostsRun:
    """As `mpirun`, over two separate hosts: see `tests.hosts`."""
    return HostsRun(lane, tmp_path, _two)


@pytest.fixture
def four_hosts(lane: Lane, tmp_path: Path, _four: Hosts) -> HostsRun:
    """As `mpirun`, over four separate hosts."""
    return HostsRun(lane, tmp_path, _four)
