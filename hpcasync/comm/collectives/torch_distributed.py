"""The torch.distributed backend: gloo in host memory, nccl on GPUs; the ranks find each other through MPI."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcasync.comm.addresses import addresses, interface_of
from hpcasync.comm.agree import raise_together
from hpcasync.comm.collectives.base import Buffer, Done, OverMPI, Pending, as_array, host_buffers
from hpcasync.comm.collectives.gpu import own_gpus
from hpcasync.comm.failure import leaving_in_error
from hpcasync.comm.world import World
from hpcasync.errors import UsageError

CONNECT_SECONDS = 3.0
"""How long one address of rank 0 is tried."""

TIMEOUT = timedelta(minutes=30)
"""After so long torch gives a collective up."""


def problem(world: World) -> str | None:
    """Why torch.distributed can't run here."""
    if not dist.is_available() or not dist.is_gloo_available():
        return f"--collectives torch: torch {torch.__version__} is built without gloo; use mpi or window"
    if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
        return (
            f"--collectives torch: torch.distributed is initialised already, as rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; under MPI this is rank {world.rank} of {world.size}. Leave init_process_group to hpcasync."
        )
    return None


def open(world: World) -> TorchCollectives:  # the name that every backend gives it
    """The backend over all ranks. Collective."""
    if not all(world.gather(dist.is_initialized())):
        if dist.is_initialized():
            raise UsageError("--collectives torch: torch.distributed is initialised on some ranks only")
        _initialise(world)
    return TorchCollectives(world)


class _Work:
    """A started operation of torch.distributed."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._waited = False

    def wait(self) -> None:
        if not self._waited:
            self._work.wait()
            self._waited = True

    def test(self) -> bool:
        if not self._waited and self._work.is_completed():
            self.wait()  # raises what went wrong
        return self._waited


class TorchCollectives(OverMPI):
    """Sums by torch.distributed, on the GPU where nccl has one for each rank; broadcast and barrier are MPI's.

    Args:
        world: the ranks; torch's default process group is initialised.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world.collectives)
        self._on_gpu = own_gpus(world) and dist.is_nccl_available()
        self._host = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._device = dist.new_group(backend="nccl", timeout=TIMEOUT) if self._on_gpu else None

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        if self._on_gpu and device.type == "cuda":
            return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        return host_buffers(sizes, dtype, device)

    def start_allreduce(self, buffer: Buffer) -> Pending:
        if isinstance(buffer, Tensor) and buffer.device.type == "cuda":
            return _Work(dist.all_reduce(buffer, group=self._device, async_op=True))
        tensor = torch.from_numpy(as_array(buffer))
        return _Work(dist.all_reduce(tensor, group=self._host, async_op=True)) if tensor.numel() else Done()

    def close(self) -> None:
        for group in (self._host, self._device):
            if group is not None:
                self._mpi.barrier()  # nobody leaves while another still sends
                dist.destroy_process_group(group)
        self._host = self._device = None


def _initialise(world: World) -> None:
    """Make torch's default process group: rank 0 listens on a free port, MPI says where."""
    store = None
    if world.rank == 0:
        host = "127.0.0.1" if world.nodes == 1 else "0.0.0.0"
        store = dist.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    port, offered = world.gather((store.port, addresses()) if store is not None else None)[0]
    chosen, problem = None, None
    if world.nodes == 1:
        chosen = ("127.0.0.1", "lo")
    elif world.rank > 0:
        chosen = _reach(offered, port)
        if chosen is None:
            problem = (
                f"--collectives torch: rank {world.rank} on {socket.gethostname()} reaches rank 0 at none of "
                f"{', '.join(offered)}, port {port}; name the network's interface: GLOO_SOCKET_IFNAME=eth0"
            )
    raise_together(world, problem)
    everyone = world.gather(chosen)
    if chosen is None:
        chosen = (everyone[-1][0], interface_of(everyone[-1][0]))
    host, interface = chosen
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if store is None:
        store = dist.TCPStore(host, port, world.size, is_master=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized() and not leaving_in_error():
        dist.destroy_process_group()


def _reach(offered: Sequence[str], port: int) -> tuple[str, str] | None:
    """The first address that answers, and the interface on the way there."""
    for address in offered:
        try:
            with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
                return address, interface_of(connection.getsockname()[0])
        except OSError:
            continue
    return None
