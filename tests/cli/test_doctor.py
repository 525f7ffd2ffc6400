"""`hpcasync doctor` on real ranks: every line it must have, and what makes it complain."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import hosts
from tests.hosts import HostsRun
from tests.mpi import Lane, MpiRun

pytestmark = pytest.mark.timeout(600)

CHECKS = ["MPI", "thread level", "launcher", "node map", "oversubscription", "devices", "shared memory", "windows"]
CHECKS += [
    "lost updates",
    "torn reads",
    "bandwidth",
    "HDF5",
    *(f"collectives {n}" for n in ("mpi", "window", "torch", "horovod")),
]


def _report(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    (text,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    report = json.loads(text)
    lines = {line["check"]: line for line in report["lines"]}
    statuses = [line["status"] for line in report["lines"]]
    assert len(lines) == len(statuses) and {s: statuses.count(s) for s in ("ok", "warn", "fail")}.items() <= report.items()
    assert done.returncode == int(report["status"] == "fail")
    assert all(bool(line["remedy"]) or line["status"] == "ok" for line in report["lines"])
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_is_well(mpirun: MpiRun, ranks: int) -> None:
    lines = _report(mpirun.cli(["doctor", "--json"], None if ranks == 1 else ranks, timeout=250))
    assert set(CHECKS) <= set(lines)
    assert mpirun.lane.name in lines["MPI"]["found"].lower().replace(" ", "")
    assert lines["thread level"]["found"] == "multiple"
    assert f"none in {40 * ranks} pushes of {ranks} rank" in lines["lost updates"]["found"]
    assert lines["torn reads"]["status"] == "ok"
    assert "copy" in lines["bandwidth"]["found"] and ("put" in lines["bandwidth"]["found"]) == (ranks > 1)
    assert "written, locked and read" in lines["HDF5"]["found"]
    assert all(line["status"] != "fail" for line in lines.values())
    if ranks == 1:
        assert lines["windows"]["remedy"] == "mpiexec -n 2 hpcasync doctor"
    else:
        assert "allocate-shared" in lines["windows"]["found"]
        assert lines["passive progress in a node"]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_people_see_a_line_per_check_and_the_sums(mpirun: MpiRun) -> None:
    done = mpirun.cli(["doctor"], 4, timeout=200)
    lines = done.stdout.splitlines()
    assert any(line.startswith("ok    launcher: ") for line in lines)
    assert sum(line.startswith(("ok ", "warn ", "fail ")) for line in lines) >= len(CHECKS)
    assert lines[-1].endswith(", 0 fail")


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_two_hosts(lane: Lane, tmp_path: Path) -> None:
    """Real separate hosts: the store across nodes, and a network that waits for a busy target."""
    reason = hosts.missing()
    if reason is not None:
        pytest.skip(reason)
    with hosts.Hosts(2) as two:
        lines = _report(HostsRun(lane, tmp_path, two).cli(["doctor", "--json"], 2, timeout=200))
    assert "2 ranks on 2 nodes (n1: 1, n2: 1)" in lines["node map"]["found"]
    assert "none in 80 pushes of 2 ranks" in lines["lost updates"]["found"]
    assert "--progress thread" in lines["passive progress between nodes"]["found"]
    assert "on another node" in lines["bandwidth"]["found"]


def test_a_job_that_srun_started_with_the_wrong_manager(mpirun: MpiRun) -> None:
    """Once, in words of the launcher, by the first task; the others are silent and fail too."""
    for rank, says in (("0", True), ("1", False)):
        env = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": rank}
        done = mpirun.cli(["doctor"], None, env=env, check=False)
        assert done.returncode == 1
        assert ("fail  launcher: srun started 4 tasks, but MPI sees a world of size 1" in done.stdout) == says
        assert ("-> srun used a process manager" in done.stdout and "srun --mpi=pmi2" in done.stdout) == says
        assert says or done.stdout == ""


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_thread_level_too_low(mpirun: MpiRun) -> None:
    code = """
        import mpi4py, sys
        mpi4py.rc.thread_level = "serialized"
        from hpcasync.cli import main
        sys.exit(main(["doctor"]))
        """
    done = mpirun(code, None, check=False)
    assert done.returncode == 1
    assert "fail  thread level: serialized" in done.stdout and "mpi4py.rc.thread_level" in done.stdout


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_updates_without_locks_are_seen_to_be_lost(mpirun: MpiRun) -> None:
    """The probe must be able to fail: Hogwild's pushes overwrite each other."""
    code = """
        from hpcasync import init
        from hpcasync.doctor.speed import check_updates
        from hpcasync.rules import Hogwild
        world = init()
        for attempt in range(20):
            lines = {line.check: line for line in check_updates(world, Hogwild(lr=1.0))}
            if lines["lost updates"].status == "fail":
                break
        if world.rank == 0:
            print(lines["lost updates"])
        """
    assert "status='fail'" in mpirun(code, 2, timeout=250).stdout


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_machine_checks(mpirun: MpiRun) -> None:
    """Two ranks bound to one core, an allocation with more nodes, a folder that takes no files, a window that is missing."""
    code = """
        import os
        from pathlib import Path
        from hpcasync import init
        from hpcasync.doctor import machine, windows
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ["SLURM_JOB_NODELIST"] = "n[1-3]"
        world = init()
        lines = [*machine.check_cores(world), *machine.check_nodes(world), *machine.check_hdf5(world, Path("/proc"))]
        lines.append(windows._kinds({"create": 0, "allocate": 0}, {"create": "out of order"}))
        lines += windows._progress({("allocate-shared", "node"): 0.29}, True, False)
        if world.rank == 0:
            print(*lines, sep="\\n")
        """
    out = mpirun(code, 2).stdout.splitlines()
    for line, (check, status, part) in zip(
        out,
        [
            ("oversubscription", "warn", "2 x 1 threads on 1 cores: more threads than cores"),
            ("node map", "warn", "the allocation has 3: n[1-3]"),
            ("HDF5", "fail", "can't write there"),
            ("windows", "fail", "allocate work; not create (out of order)"),
            ("passive progress in a node", "warn", "290.00 ms"),
        ],
        strict=True,
    ):
        assert line.startswith(f"Line(check='{check}', status='{status}'") and part in line


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_little_shared_memory(mpirun: MpiRun, tmp_path: Path) -> None:
    """Docker's 64 MB, mounted for this process alone."""
    mount = ["unshare", "--mount", "--propagation", "private", "bash", "-c"]
    if subprocess.run([*mount, "mount -t tmpfs -o size=32m tmpfs /dev/shm"], capture_output=True).returncode:
        pytest.skip("can't mount a /dev/shm of its own here (needs root)")
    program = tmp_path / "shm.py"
    program.write_text("from hpcasync import init\nfrom hpcasync.doctor.machine import check_shared_memory\n")
    program.open("a").write("print(check_shared_memory(init(mpi=False))[0])\n")
    script = f"mount -t tmpfs -o size=32m tmpfs /dev/shm; exec {mpirun.lane.python} {program}"
    done = subprocess.run([*mount, script], capture_output=True, text=True, env=mpirun._environment({}))
    assert "status='fail', found='32 MiB free in /dev/shm'" in done.stdout, done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_check_that_hangs_is_a_line_and_the_end(mpirun: MpiRun, ranks: int) -> None:
    code = """
        import sys, time
        from hpcasync.cli import main
        from hpcasync.doctor import examine
        sys.modules["hpcasync.doctor.examine"].SECONDS = 1.0
        sys.modules["hpcasync.doctor.examine"]._checks = lambda folder: {"slow": lambda world: time.sleep(300)}
        sys.exit(main(["doctor", "--json"]))
        """
    done = mpirun(code, ranks, check=False)
    assert done.returncode != 0
    (text,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    last = json.loads(text)["lines"][-1]
    assert (last["check"], last["status"], last["found"]) == ("slow", "fail", "no end after 1 s")


def test_no_such_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from hpcasync.cli import main

    assert main(["doctor", "--output", "/nowhere"]) == 2
    assert "--output /nowhere: no such folder" in capsys.readouterr().err
