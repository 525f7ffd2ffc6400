"""``hpcasync bench``: OSU-format rows that a script can read."""

from __future__ import annotations

import pytest

from hpcasync.cli.bench import parse_size
from hpcasync.errors import UsageError
from tests.mpi import MpiRun


def rows(text: str) -> list[tuple[int, float, float]]:
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [(int(size), float(latency), float(bandwidth)) for size, latency, bandwidth in lines]


@pytest.mark.parametrize("backend", ["mpi", "window"])
def test_allreduce(mpirun: MpiRun, backend: str) -> None:
    done = mpirun.cli(["bench", "allreduce", "--collectives", backend, "--sizes", "4", "1K", "64K", "--rounds", "3"], 2)
    found = rows(done.stdout)
    assert [size for size, _, _ in found] == [4, 1024, 65536]
    assert all(bandwidth == pytest.approx(size / latency, abs=0.02) for size, latency, bandwidth in found)
    assert f"# hpcasync allreduce, {backend}, 2 ranks on 1 node" in done.stdout


def test_rma(mpirun: MpiRun) -> None:
    done = mpirun.cli(["bench", "rma", "--sizes", "64", "64K", "--rounds", "3"], 2)
    assert [size for size, _, _ in rows(done.stdout)] == [64, 65536, 64, 65536, 8, 0]
    assert all(latency > 0 for _, latency, _ in rows(done.stdout))
    for name in ("put", "get", "fetch-and-op", "flush"):
        assert f"# hpcasync {name}" in done.stdout


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the checks come before MPI
def test_bad_input(mpirun: MpiRun) -> None:
    for flags, text in (
        (["rma"], "bench rma needs at least 2 ranks"),
        (["allreduce", "--sizes", "4X"], "--sizes 4X: expected bytes"),
        (["allreduce", "--sizes", "4", "9000G"], "leave the largest out"),
        (["rma", "--sizes", "9000G"], "leave the largest out"),
        (["allreduce", "--rounds", "0"], "--rounds=0: expected at least 1"),
        (["allreduce", "--collectives", "mpl"], "did you mean 'mpi'"),
    ):
        done = mpirun.cli(["bench", *flags], 1, check=False)
        assert done.returncode == 2 and text in done.stderr, done.stderr


def test_sizes() -> None:
    assert [parse_size(t) for t in ("4", "4k", "16M", "1G")] == [4, 4096, 16 << 20, 1 << 30]
    for bad in ("", "0", "-1", "1.5M", "M"):
        with pytest.raises(UsageError):
            parse_size(bad)
