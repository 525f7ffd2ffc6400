"""The hosts of the tests are separate hosts: names, shared memory, a link of 1 Gbit/s; and they leave nothing behind."""

from __future__ import annotations

import subprocess

from tests.hosts import Hosts, HostsRun

PROGRAM = """
import os, socket, time
import numpy as np
import hpcasync as ha
world = ha.init()
names = world.gather(socket.gethostname())
inodes = world.gather(os.stat("/dev/shm").st_dev)
if world.rank == 0:
    assert names == ["n1", "n1", "n2", "n2"], names
    assert len(set(inodes)) == 2, inodes
assert (world.nodes, world.local_size, world.node) == (2, 2, world.rank // 2)
seconds = []
for _ in range(3):  # 8 MB one way and back: 0.13 s at 1 Gbit/s
    data = np.zeros(1 << 20)
    world.collectives.barrier()
    began = time.perf_counter()
    if world.rank == 0:
        world.comm.Send(data, 3); world.comm.Recv(data, 3)
    elif world.rank == 3:
        world.comm.Recv(data, 0); world.comm.Send(data, 0)
    seconds.append(time.perf_counter() - began)
if world.rank == 0:
    print("rate", 2 * 8 * data.nbytes / min(seconds) / 1e9, flush=True)
"""


def test_two_hosts(two_hosts: HostsRun) -> None:
    done = two_hosts(PROGRAM, 4)
    rate = float(done.stdout.split("rate")[1])
    assert 0 < rate < 1.3, rate  # Gbit/s; how much less is the load of the machine


def test_nothing_is_left(_two: Hosts) -> None:
    with Hosts(1) as hosts:
        inside = subprocess.run([*hosts.enter("n1"), "ip", "-br", "link"], capture_output=True, text=True).stdout
        assert "eth0" in inside
        pids, folder = [p.pid for p in hosts._holders.values()], hosts.agent.parent
    outside = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    assert "br0" not in outside and "v0" not in outside
    assert not folder.exists() and len(pids) == 2
