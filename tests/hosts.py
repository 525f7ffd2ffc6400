"""Separate hosts on one machine, for tests across nodes: namespaces with a name, an address and a /dev/shm of their own.

    with Hosts(2) as hosts:
        HostsRun(lane, tmp_path, hosts)("...", n=4)       # two ranks on each of two hosts, under a real mpiexec

Every host is a process that holds a network, UTS, mount and IPC namespace; a further one, "login", holds the bridge between
them and runs mpiexec. Their links are shaped. Nothing outlives the process that made them: the holders die with it, and the
namespaces with their last process.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.mpi import Lane, MpiRun

SUBNET = "10.231.78"  # inside namespaces of its own: several Hosts may use it at a time
LOGIN = 254


class Hosts:
    """``count`` hosts n1, n2, ... behind links of ``rate``.

    Args:
        count: how many.
        rate: of each host's link, as tc takes it.
    """

    def __init__(self, count: int, rate: str = "1gbit") -> None:
        self.count = count
        self.names = [f"n{i + 1}" for i in range(count)]
        self._rate = rate
        self._folder = tempfile.TemporaryDirectory(prefix="hosts-")
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def enter(self, name: str) -> list[str]:
        """The command prefix that runs something on a host."""
        pid = str(self._holders[name].pid)
        return ["nsenter", "-t", pid, "--net", "--uts", "--mount", "--ipc", f"--wd={os.getcwd()}", "--"]

    @property
    def agent(self) -> Path:
        """What mpiexec calls in place of ssh: ``agent [options] HOST COMMAND...``."""
        return Path(self._folder.name) / "agent"

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _start(self) -> None:
        folder = Path(self._folder.name)
        rows = ["127.0.0.1 localhost", f"{SUBNET}.{LOGIN} login"]
        rows += [f"{SUBNET}.{i + 1} {name}" for i, name in enumerate(self.names)]
        (folder / "hosts").write_text("\n".join(rows) + "\n")
        for name in ("login", *self.names):
            self._hold(name)
            self._sh(
                name,
                f"hostname {name}; ip link set lo up; mount --bind {folder}/hosts /etc/hosts; "
                "mount -t tmpfs -o size=50% tmpfs /dev/shm",
            )
        shape = f"root tbf rate {self._rate} burst 256k latency 100ms"
        self._sh("login", f"ip link add br0 type bridge; ip addr add {SUBNET}.{LOGIN}/24 dev br0; ip link set br0 up")
        cases = []
        for i, name in enumerate(self.names):
            pid = self._holders[name].pid
            self._sh("login", f"ip link add v{i} type veth peer name eth0 netns {pid}; ip link set v{i} master br0 up")
            self._sh(name, f"ip addr add {SUBNET}.{i + 1}/24 dev eth0; ip link set eth0 up; tc qdisc add dev eth0 {shape}")
            self._sh("login", f"tc qdisc add dev v{i} {shape}")
            cases.append(f"{name}) pid={pid};;")
        # Hydra and PRRTE give ssh options, the host, then one line for the remote shell.
        self.agent.write_text(
            "#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n"
            f"case $1 in {' '.join(cases)} *) echo \"no host $1\" >&2; exit 1;; esac\nshift\n"
            'exec nsenter -t $pid --net --uts --mount --ipc --wd="$PWD" -- bash -c "$*"\n'
        )
        self.agent.chmod(0o755)

    def _hold(self, name: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--uts", "--mount", "--ipc"]
        command += ["--propagation", "private", "bash", "-c", "echo; exec sleep infinity"]
        holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        self._holders[name] = holder
        assert holder.stdout is not None
        if not holder.stdout.readline():  # a line: the namespaces exist now
            raise OSError(f"no namespaces for host {name}")
        holder.stdout.close()

    def _sh(self, name: str, script: str) -> None:
        done = subprocess.run([*self.enter(name), "bash", "-euc", script], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"on host {name}: {script}\n{done.stderr}")

    def _stop(self) -> None:
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
        self._folder.cleanup()


@functools.cache
def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    try:
        with Hosts(1) as hosts:
            done = subprocess.run([*hosts.enter("n1"), "hostname"], capture_output=True, text=True)
            return None if done.stdout.strip() == "n1" else f"a host calls itself {done.stdout!r}: {done.stderr}"
    except OSError as error:
        return f"no network namespaces with shaped links here (needs root, ip, tc, nsenter): {error}"


class HostsRun(MpiRun):
    """``MpiRun`` over hosts: rank r runs on host r // (n / hosts), or as ``ranks`` says."""

    def __init__(self, lane: Lane, folder: Path, hosts: Hosts, ranks: Sequence[int] | None = None) -> None:
        super().__init__(lane, folder)
        self.hosts = hosts
        self.ranks = ranks

    def _command(self, command: list[str], n: int, launcher: Sequence[str]) -> list[str]:
        counts = list(self.ranks) if self.ranks is not None else [n // self.hosts.count] * self.hosts.count
        assert sum(counts) == n, f"{n} ranks on {counts}"
        slots = ",".join(f"{name}:{count}" for name, count in zip(self.hosts.names, counts))
        if self.lane.name == "mpich":
            where = ["-launcher", "ssh", "-launcher-exec", str(self.hosts.agent), "-hosts", slots]
        else:
            where = ["--prtemca", "plm_ssh_agent", str(self.hosts.agent), "--host", slots, "--map-by", "slot"]
        return [*self.hosts.enter("login"), *super()._command(command, n, [*where, *launcher])]
