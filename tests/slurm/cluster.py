"""A real Slurm for tests: slurmctld, one slurmd per host, munged; up in about a second, gone without a trace.

    with Hosts(2) as hosts, Cluster(hosts) as slurm:
        job = slurm.sbatch("job.sh")
        assert slurm.wait(job) == "COMPLETED"

Every slurmd runs on a host of its own (tests/hosts.py), so addresses and ports meet nobody else's. All files lie in one
temporary folder. The daemons are children of this process and die with it; `close` ends them by their process ids, and
the job steps that outlive them by this cluster's folder in their environment.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.hosts import LOGIN, SUBNET, Hosts

SBIN = f"/usr/sbin:/sbin:{os.environ.get('PATH', os.defpath)}"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "sinfo", "sbcast")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    if lacking:
        return f"no Slurm here (no {', '.join(lacking)}): apt-get install slurm-wlm munge"
    return None


class Cluster:
    """A cluster over ``hosts``, with the partitions ``debug`` and, which preempts it, ``high``.

    Args:
        hosts: the nodes; the controller runs on their "login".
        cpus: of each node, as Slurm counts them.
        gpus: of each node: character devices that nothing opens.
        kill_wait: seconds from SIGTERM to SIGKILL.
        grace: seconds from the signal of a preemption to its end.
    """

    def __init__(self, hosts: Hosts, *, cpus: int = 4, gpus: int = 2, kill_wait: int = 10, grace: int = 60) -> None:
        self.hosts = hosts
        self.cpus, self.gpus, self.kill_wait, self.grace = cpus, gpus, kill_wait, grace
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 bytes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What tests use.

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user of this cluster, not of one that this process may itself run on."""
        outer = ("SLURM_", "SBATCH_", "SRUN_", "OMPI_", "PMI", "PRTE_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        return env | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SBIN}

    def run(
        self, command: Sequence[str | Path], *, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host; ``check`` raises RuntimeError with its output when it fails."""
        words = [*self.hosts.enter("login"), *map(str, command)]
        full = self.env | dict(env or {})
        done = subprocess.run(words, env=full, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def sbatch(self, *words: str | Path, env: Mapping[str, str] | None = None) -> int:
        """Submit; returns the job's number."""
        return int(self.run(["sbatch", "--parsable", *words], env=env).stdout.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What scontrol shows of a job."""
        out = self.run(["scontrol", "--oneliner", "show", "job", str(number)]).stdout
        return dict(field.split("=", 1) for field in out.split() if "=" in field)

    def wait(self, number: int | str, *states: str, timeout: float = 150) -> str:
        """Wait until the job is in one of ``states`` (default: it has ended); returns which."""
        state = ""

        def there() -> bool:
            nonlocal state
            state = self.job(number)["JobState"]
            return state in (states or ENDED)

        self.until(there, f"job {number} in {states or 'its end'}", timeout, lambda: f"it is {state}")
        return state

    def until(self, test: Callable[[], bool], what: str, timeout: float = 90, more: Callable[[], str] = str) -> None:
        """Wait until ``test()``; TimeoutError, or RuntimeError when a daemon has ended, with ``what`` and the daemons' logs."""
        end = time.monotonic() + timeout
        while not test():
            if self._ended():
                raise RuntimeError(f"no {what}: {', '.join(self._ended())} ended\n{self._logs()}")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} after {timeout} s; {more()}\n{self._logs()}")
            time.sleep(0.1)

    # Start.

    def _start(self) -> None:
        self._write()
        socket = self.folder / "munge.socket"
        munged = ["munged", "-F", "-f", f"--socket={socket}", f"--origin={SUBNET}.{LOGIN}", "--num-threads=2"]
        munged += [f"--{what}={self.folder}/munge.{suffix}" for what, suffix in _MUNGE_FILES.items()]
        self._daemon("munged", "login", munged)
        self.until(socket.exists, "munged")
        self._daemon("slurmctld", "login", ["slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")])
        self.until(lambda: "UP" in self.run(["scontrol", "ping"], check=False).stdout, "slurmctld")
        for name in self.hosts.names:
            self._daemon(f"slurmd.{name}", name, ["slurmd", "-D", "-N", name, "-f", str(self.folder / name / "slurm.conf")])
        idle = ["idle"] * self.hosts.count
        self.until(lambda: self.run(["sinfo", "-h", "-N", "-p", "debug", "-o", "%T"]).stdout.split() == idle, "idle nodes")

    def _daemon(self, name: str, host: str, command: Sequence[str]) -> None:
        words = ["setpriv", "--pdeathsig", "TERM", "--", *self.hosts.enter(host), *command]
        with open(self.folder / f"{name}.out", "ab") as out:
            daemon = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder, start_new_session=True
            )
        self._daemons[name] = daemon

    def _write(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={SUBNET}.{i + 1} CPUs={self.cpus} RealMemory=2000 Gres=gpu:{self.gpus}"
            for i, name in enumerate(self.hosts.names)
        )
        user = pwd.getpwuid(os.getuid()).pw_name
        conf = _CONF.format(c=self, user=user, login=f"{SUBNET}.{LOGIN}", folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(self.gpus):  # Slurm wants character devices with a number at the end
            os.mknod(folder / f"gpu{i}", 0o020666, os.makedev(1, 3))
        files = f"{folder}/gpu[0-{self.gpus - 1}]"
        (folder / "gres.conf").write_text("".join(f"NodeName={n} Name=gpu File={files}\n" for n in self.hosts.names))
        for name in self.hosts.names:
            # A folder of its own per slurmd: two must not make PMIx's files in one place.
            own = folder / name
            own.mkdir()
            (own / "pmix").mkdir(mode=0o777)
            for file in ("slurm.conf", "gres.conf", "cgroup.conf"):
                (own / file).symlink_to(folder / file)
            (own / "mpi.conf").write_text(f"PMIxCliTmpDirBase={own}/pmix\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _logs(self) -> str:
        texts = [f"-- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(self.folder.glob("*.out"))]
        return "\n".join(texts)

    def _ended(self) -> list[str]:
        return [name for name, daemon in self._daemons.items() if daemon.poll() is not None]

    # Stop.

    def close(self) -> None:
        """Cancel the jobs, end every process of this cluster and remove its files."""
        with contextlib.suppress(Exception):
            self._cancel()
        for daemon in reversed(self._daemons.values()):
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _cancel(self) -> None:
        numbers = self.run(["squeue", "-h", "-o", "%A"]).stdout.split()
        if numbers:
            self.run(["scancel", "--signal=KILL", "--full", *numbers], check=False)
            self.run(["scancel", *numbers], check=False)
            self.until(lambda: not self.run(["squeue", "-h"]).stdout.strip(), "empty queue", 5)

    def processes(self) -> list[int]:
        """Every process of this cluster: daemons, steps and the jobs' own."""
        wanted = f"SLURM_CONF={self.folder}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if int(entry.name) != os.getpid() and any(word.startswith(wanted) for word in words):
                    found.append(int(entry.name))
        return found


_MUNGE_FILES = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}

_CONF = """\
ClusterName=test
SlurmctldHost=login({login})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credential has expired; below 5 s Slurm takes its default, two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
# No cgroups and no systemd; more CPUs than the machine has.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
# Without it a preemption signals the steps only, and the batch script cannot know.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={c.kill_wait}
MailProg=/bin/true
PropagateResourceLimits=NONE
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={c.grace}
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
