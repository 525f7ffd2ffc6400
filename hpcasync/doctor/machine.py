"""The nodes and what the ranks get of them: map, cores, devices, shared memory, files."""

from __future__ import annotations

import os
import platform
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hpcasync.comm import World
from hpcasync.doctor.line import Line, fail, ok, warn
from hpcasync.errors import UsageError

SMALL, LITTLE = 64 << 20, 1 << 30
"""Bytes of shared memory: Docker's default, which a window soon outgrows; and enough for 100 M parameters with momentum."""


def check_nodes(world: World) -> list[Line]:
    """Which ranks are where, and whether all nodes of the allocation have some. Collective."""
    hosts = world.gather((world.node, platform.node()))
    counts = Counter(hosts)
    text = ", ".join(f"{host}: {count}" for (_, host), count in sorted(counts.items()))
    found = f"{world.size} rank{'s' * (world.size > 1)} on {world.nodes} node{'s' * (world.nodes > 1)} ({text})"
    names = {host for _, host in hosts}
    allocated = os.environ.get("SLURM_JOB_NODELIST", "") if world.size > 1 else ""
    if allocated:
        from hpcasync.slurm import parse_nodelist

        try:
            nodes = parse_nodelist(allocated, "SLURM_JOB_NODELIST")
        except UsageError as error:
            return [warn("node map", f"{found}; {error}", "ask the site what its scheduler means by that")]
        if len(nodes) > len(names):
            remedy = "start ranks on all of them (srun without -N or -n; mpiexec -n $SLURM_NTASKS), or ask for fewer"
            return [warn("node map", f"{found}; the allocation has {len(nodes)}: {allocated}", remedy)]
    if world.nodes > len(names):
        remedy = "a container, or MPIR_CVAR_NOLOCAL, keeps ranks from sharing memory: leave it out unless it is meant"
        return [warn("node map", f"{found}, but only {len(names)} host name{'s' * (len(names) > 1)}", remedy)]
    if len(set(counts.values())) > 1:
        return [warn("node map", found, "unequal ranks per node: the fuller nodes are slower; give each as many")]
    return [ok("node map", found)]


def check_cores(world: World) -> list[Line]:
    """Cores, threads and binding of the ranks of each node. Collective."""
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(range(os.cpu_count() or 1))
    everyone = world.gather((world.node, cores, world.threads))
    crowded, shared, texts = [], [], []
    for node in range(world.nodes):
        ranks = [(own, threads) for n, own, threads in everyone if n == node]
        union, threads = frozenset().union(*(own for own, _ in ranks)), sum(t for _, t in ranks)
        texts.append(f"{len(ranks)} x {ranks[0][1]} threads on {len(union)} cores")
        if threads > len(union):
            crowded.append(node)
        bound = any(own != union for own, _ in ranks)
        if bound and sum(len(own) for own, _ in ranks) > len(union):
            shared.append(node)
    found = "; ".join(f"{count} nodes with {text}" if count > 1 else text for text, count in Counter(texts).items())
    if crowded:
        remedy = (
            "fewer ranks per node, or fewer threads: OMP_NUM_THREADS, --threads; under srun --cpus-per-task, SRUN_CPUS_PER_TASK"
        )
        return [warn("oversubscription", f"{found}: more threads than cores", remedy)]
    binding = ok(
        "core binding", "each rank has cores of its own" if _all_bound(everyone) else "none: the system places the ranks"
    )
    if shared:
        binding = warn(
            "core binding", "some ranks are bound to the same cores", "srun --cpu-bind=cores, or mpiexec --bind-to none"
        )
    return [ok("oversubscription", found), binding]


def _all_bound(everyone: list[tuple[int, frozenset[int], int]]) -> bool:
    return all(not (a & b) for i, (n, a, _) in enumerate(everyone) for m, b, _ in everyone[:i] if n == m)


def check_devices(world: World) -> list[Line]:
    """Which GPU each rank works on. Collective."""
    import torch

    own: tuple[int, str] | None = None
    if world.device.type == "cuda":
        facts: Any = torch.cuda.get_device_properties(world.device)
        own = (world.node, f"{facts.name} {getattr(facts, 'uuid', world.device.index)}")
    devices = world.gather(own)
    with_gpu = [d for d in devices if d is not None]
    if not with_gpu:
        return [ok("devices", f"CPU on every rank; torch {torch.__version__} sees no GPU")]
    if len(with_gpu) < len(devices):
        remedy = "ask for one GPU per rank (--gpus-per-node, --gres), and look at CUDA_VISIBLE_DEVICES / ROCR_VISIBLE_DEVICES"
        return [fail("devices", f"{len(with_gpu)} of {len(devices)} ranks have a GPU, the others none", remedy)]
    most = max(Counter(with_gpu).values())
    found = f"{len(set(with_gpu))} GPUs for {len(devices)} ranks ({with_gpu[0][1].split(' ')[0]})"
    if most > 1:
        remedy = "one rank per GPU: fewer ranks per node, or more GPUs; each rank takes the one of its number on the node"
        return [warn("devices", f"{found}: up to {most} ranks share one", remedy)]
    return [ok("devices", found)]


def check_shared_memory(world: World) -> list[Line]:
    """Room in /dev/shm of every node. Collective."""
    free = None
    if Path("/dev/shm").is_dir() and hasattr(os, "statvfs"):
        status = os.statvfs("/dev/shm")
        free = status.f_bavail * status.f_frsize
    found = [(f, node) for f, node in world.gather((free, world.node)) if f is not None]
    if not found:
        return [warn("shared memory", "no /dev/shm", "mount -t tmpfs tmpfs /dev/shm, where the system allows it")]
    least, node = min(found)
    text = f"{least / 2**20:,.0f} MiB free in /dev/shm" + (f" of node {node}" if world.nodes > 1 else "")
    remedy = "mount -o remount,size=... /dev/shm, docker run --shm-size=..., or remove stale files in it"
    if least < LITTLE:
        return [(fail if least < SMALL else warn)("shared memory", text, remedy)]
    return [ok("shared memory", text)]


def check_hdf5(world: World, folder: Path) -> list[Line]:
    """Whether HDF5 can write, lock and read a file in ``folder``, from rank 0. Collective."""
    line = _hdf5(folder) if world.rank == 0 else None
    return [next(found for found in world.gather(line) if found is not None)]


def _hdf5(folder: Path) -> Line:
    import h5py

    setting = os.environ.get("HDF5_USE_FILE_LOCKING", "")
    about = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}, in {folder}"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".hpcasync-doctor-") as inside:
            try:
                _write_and_read(Path(inside) / "locked.h5", True)
            except OSError as error:
                _write_and_read(Path(inside) / "free.h5", False)
                if setting.upper() == "FALSE":
                    return ok("HDF5", f"{about}: no file locks there, and HDF5_USE_FILE_LOCKING=FALSE")
                found = f"{about}: the file system takes no locks ({str(error).splitlines()[0]})"
                return warn("HDF5", found, "export HDF5_USE_FILE_LOCKING=FALSE")
    except OSError as error:
        return fail(
            "HDF5", f"{about}: can't write there ({error})", "run it in, or name with --output, a folder you may write to"
        )
    return ok("HDF5", f"{about}: written, locked and read")


def _write_and_read(path: Path, locking: bool) -> None:
    import h5py

    with h5py.File(path, "w", locking=locking) as file:
        file["x"] = range(8)
    with h5py.File(path, "r", locking=locking) as file:
        if list(file["x"]) != list(range(8)):
            raise OSError(f"{path}: read something else than was written")
