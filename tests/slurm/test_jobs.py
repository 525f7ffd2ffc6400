"""Our own batch scripts on a real Slurm: launch, array, preemption, requeue, failure. The time limit: test_train.py."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mpi import Lane, require_lane
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Submit, Submitted, require

pytestmark = pytest.mark.timeout(400)  # a cluster, and up to three jobs, on a machine that may be busy
LOOP = Path(__file__).with_name("loop.py")
TOTAL = 4 * sum(range(30))  # of 4 ranks that count to 30


@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_ranks_of_two_nodes_are_one_world(submit: Submit, lane: Lane, launcher: str, tmp_path: Path) -> None:
    """srun with the plugin that fits the MPI of the environment, and mpiexec inside the allocation."""
    if lane.name == "openmpi" and launcher == "srun":
        _require_pmix()
    flags = ("--nodes", 2, "--ranks-per-node", 2, "--cpus-per-rank", 2, "--launcher", launcher)
    job = submit(*flags, "--", LOOP, tmp_path / "state", 10, lane=lane)
    assert job.wait() == "COMPLETED", job.output()
    out = job.output()
    assert re.search(r"start at 0 on n1:\S+ n1:\S+ n2:\S+ n2:\S+ restart 0", out)
    assert f"done at 10 total {4 * sum(range(10))}" in out
    assert f"python {lane.prefix}/bin/python" in out
    assert "threads 2 cpus 2" in out
    if launcher == "srun":
        assert f"--mpi={'pmi2' if lane.name == 'mpich' else 'pmix'}" in (job.folder / "job.sh").read_text()


def _require_pmix() -> None:
    if not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")):
        require("srun --mpi=pmix needs libpmix.so: apt-get install libpmix-dev")


def test_a_folder_with_odd_characters(submit: Submit, tmp_path: Path) -> None:
    folder = tmp_path / "a run's $HOME"
    done = submit.command("--output", folder, "--nodes", 1, "--ranks-per-node", 1, "--", LOOP, folder / "state", 3)
    assert done.returncode == 0, done.stderr
    job = Submitted(submit.slurm, int(done.stdout.split()[2].rstrip(":")), folder)
    assert job.wait() == "COMPLETED" and "done at 3" in job.output()


def test_each_rank_sees_the_gpu_of_its_site(submit: Submit, tmp_path: Path) -> None:
    """A profile in the manner of Perlmutter: all GPUs for every task, a variable picks one."""
    site = tmp_path / "site.toml"
    site.write_text(
        'description = "two GPUs per node"\ngpus_per_node = 2\n[sbatch]\ngpus-per-node = 2\n[srun]\ngpu-bind = "none"\n'
        '[rank_environment]\nCUDA_VISIBLE_DEVICES = "$((1 - SLURM_LOCALID))"\n'
    )
    job = submit("--site", site, "--nodes", 2, "--", LOOP, tmp_path / "state", 3)
    assert job.wait() == "COMPLETED", job.output()
    assert "on n1:1 n1:0 n2:1 n2:0 " in job.output()


def test_an_array_has_a_seed_or_a_combination_per_element(submit: Submit, slurm: Cluster, tmp_path: Path) -> None:
    seeds = submit("--nodes", 1, "--ranks-per-node", 1, "--array", "3,5", "--", LOOP, tmp_path / "state", 3)
    sweep = submit("--nodes", 1, "--ranks-per-node", 1, "--sweep", "seed=a,b", "--", LOOP, tmp_path / "state", 3)
    for job, index, seed in ((seeds, 3, "3"), (seeds, 5, "5"), (sweep, 0, "a"), (sweep, 1, "b")):
        slurm.until(lambda job=job, i=index: "done" in job.output(i), f"element {index}", 150)  # type: ignore[misc]
        assert f"seed {seed} " in job.output(index)


def _after_its_start(submit: Submit, *flags: str | int, launcher: str = "srun", lane: Lane | None = None) -> Submitted:
    """A job of 4 ranks on 2 nodes that counts to 30, once it counts; at 20 it waits for a signal."""
    program = (LOOP, submit.folder / "state", 30, "--hold", 20)
    job = submit("--nodes", 2, "--ranks-per-node", 2, "--launcher", launcher, *flags, "--", *program, lane=lane)
    job.wait_for("start at 0")
    return job


def _went_on(job: Submitted, slurm: Cluster) -> None:
    """The job stopped for a signal, was queued again, went on from its last step, and counted nothing twice."""
    assert job.wait() == "COMPLETED", job.output()
    out = job.output()
    stopped = re.search(r"stop at (\d+) for \[1[05]", out)  # SIGUSR1 or SIGTERM
    assert stopped is not None, out
    assert f"start at {stopped[1]} on" in out and "restart 1" in out
    assert f"done at 30 total {TOTAL}" in out
    assert "to be requeued, restart 1 of at most 20" in out
    assert job.facts["Restarts"] == "1"


def _preempt(slurm: Cluster, job: Submitted) -> None:
    slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def _warn(slurm: Cluster, job: Submitted) -> None:
    slurm.run(["scancel", "--batch", "--signal=USR1", str(job.number)])


def _term_the_ranks(slurm: Cluster, job: Submitted) -> None:
    """All that a preemption does where the site has no preempt_send_user_signal: the script is told nothing."""
    slurm.run(["scancel", "--signal=TERM", str(job.number)])


@pytest.mark.parametrize(
    "lane_name, launcher, how",
    [
        ("mpich", "srun", _preempt),
        ("mpich", "srun", _term_the_ranks),
        ("openmpi", "srun", _warn),
        ("mpich", "mpiexec", _warn),
        ("openmpi", "mpiexec", _warn),
    ],
)
def test_checkpoint_requeue_resume(
    submit: Submit, slurm: Cluster, lane_name: str, launcher: str, how: Callable[[Cluster, Submitted], None]
) -> None:
    """A preemption by a higher partition, and the signals alone, which every launcher must pass on to every rank."""
    if (lane_name, launcher) == ("openmpi", "srun"):
        _require_pmix()
    job = _after_its_start(submit, launcher=launcher, lane=require_lane(lane_name))
    how(slurm, job)
    _went_on(job, slurm)


def test_a_signal_before_there_are_handlers(submit: Submit, slurm: Cluster) -> None:
    """It ends the ranks, as it would while Python starts; the job begins again all the same."""
    program = submit.folder / "early.py"
    program.write_text(
        "import os, time\nprint('early', flush=True)\ntime.sleep(0 if 'SLURM_RESTART_COUNT' in os.environ else 60)\n"
    )
    job = submit("--nodes", 1, "--ranks-per-node", 2, "--", program)
    job.wait_for("early")
    _warn(slurm, job)
    assert job.wait() == "COMPLETED", job.output()
    assert job.facts["Restarts"] == "1" and "to be requeued, restart 1" in job.output()


def test_a_cancelled_job_stays_cancelled(submit: Submit, slurm: Cluster) -> None:
    """Its ranks get SIGTERM, save and exit with 75 all the same; scontrol would bring it back."""
    job = _after_its_start(submit)
    slurm.run(["scancel", str(job.number)])
    assert job.wait() == "CANCELLED"
    slurm.until(lambda: not slurm.run(["squeue", "-h", "-j", str(job.number)], check=False).stdout.strip(), "end of the job")
    assert job.facts["Restarts"] == "0" and job.facts["JobState"] == "CANCELLED"
    assert "to be requeued" not in job.output()


def test_restarts_are_limited(submit: Submit, slurm: Cluster) -> None:
    job = _after_its_start(submit, "--max-restarts", 0)
    _warn(slurm, job)
    assert job.wait() == "FAILED"
    assert job.facts["ExitCode"] == "75:0" and job.facts["Restarts"] == "0"
    assert "0 restarts are the limit" in job.output() and f"sbatch {job.folder}/job.sh" in job.output()


@pytest.mark.parametrize("how", ["raise", "exit", "kill"])
@pytest.mark.parametrize("lane_name", ["mpich", "openmpi"])
def test_a_failing_rank_fails_the_job(submit: Submit, tmp_path: Path, lane_name: str, how: str) -> None:
    """The other ranks wait for it in a collective: the launcher has to end them."""
    if lane_name == "openmpi":
        _require_pmix()
    site = tmp_path / "site.toml"
    site.write_text('description = "little patience"\n[srun]\nwait = 3\n')
    flags = ("--site", site, "--nodes", 2, "--ranks-per-node", 2)
    job = submit(*flags, "--", LOOP, tmp_path / "state", 10_000, "--fail", how, lane=require_lane(lane_name))
    assert job.wait() == "FAILED", job.output()
    assert job.facts["Restarts"] == "0"


def _small_environment(venv: Path) -> Lane:
    """A virtual environment that borrows the MPICH lane's packages: quick to make, to pack and to send."""
    lane = require_lane("mpich")
    subprocess.run([lane.python, "-m", "venv", "--without-pip", venv], check=True)
    packages = "lib/python*/site-packages"
    (next(venv.glob(packages)) / "borrowed.pth").write_text(f"{next(lane.prefix.glob(packages))}\n")
    return Lane("mpich", venv, env={"MPI4PY_LIBMPI": str(lane.prefix / "lib" / "libmpi.so.12")})


def test_the_environment_is_broadcast(submit: Submit, slurm: Cluster, tmp_path: Path) -> None:
    """A virtual environment, to each node's own /dev/shm, from which the ranks then run; nothing stays there."""
    own = _small_environment(tmp_path / "venv")
    site = tmp_path / "site.toml"
    site.write_text('description = "disks"\nlocal = "/dev/shm"\nbroadcast = true\n')
    job = submit("--site", site, "--nodes", 2, "--ranks-per-node", 1, "--", LOOP, tmp_path / "state", 3, lane=own)
    assert job.wait() == "COMPLETED", job.output()
    assert f"python /dev/shm/hpcasync-{job.number}/bin/python" in job.output()
    for host in slurm.hosts.names:
        left = subprocess.run([*slurm.hosts.enter(host), "ls", "/dev/shm"], capture_output=True, text=True)
        assert "hpcasync" not in left.stdout


def test_a_broadcast_that_fails_ends_the_job(submit: Submit, tmp_path: Path) -> None:
    """Ranks must not start from the half of an environment."""
    site = tmp_path / "site.toml"
    site.write_text('description = "no disk"\nlocal = "/proc"\n')
    flags = ("--site", site, "--broadcast", "--nodes", 1, "--ranks-per-node", 1)
    job = submit(*flags, "--", LOOP, tmp_path / "state", 3, lane=_small_environment(tmp_path / "venv"))
    assert job.wait() == "FAILED" and job.facts["ExitCode"] == "1:0"
    assert "could not be broadcast to /proc/hpcasync-" in job.output() and "start at" not in job.output()


def test_what_slurm_refuses_is_said_and_leaves_no_script(submit: Submit) -> None:
    for flag, says in (("--sbatch=--gpus-per-node=9", "Requested node configuration"), ("--partition=gone", "invalid partition")):
        done = submit.command("--output", "x", "--nodes", 1, flag, "--ranks-per-node", 1, "--", LOOP, "state", 1)
        assert done.returncode == 2 and done.stderr.count("hpcasync: error:") == 1
        assert "sbatch refused the job" in done.stderr and says.lower() in done.stderr.lower()
        assert not (submit.folder / "x").exists()


def test_one_folder_takes_one_job(submit: Submit) -> None:
    words = ("--output", "x", "--nodes", 1, "--ranks-per-node", 1, "--", LOOP, "state", 1)
    first, second = submit.command(*words), submit.command(*words)
    assert first.returncode == 0 and second.returncode == 2
    assert "x/job.sh exists" in second.stderr and "choose another --output" in second.stderr
