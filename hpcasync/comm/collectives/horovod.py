"""The Horovod backend. A plain ``pip install horovod`` builds a hollow one; ``hpcasync build-horovod`` builds a whole one."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcasync.comm.collectives.base import Buffer, Done, OverMPI, Pending, as_array, host_buffers
from hpcasync.comm.collectives.gpu import own_gpus
from hpcasync.comm.world import World

REMEDY = "run: hpcasync build-horovod (some minutes, then cached)"
NAMES = 1024
"""Names for sums of other buffers, in turn: Horovod remembers a tensor by its name."""

_users = 0  # how many of ours are open
_ours = False  # whether we have initialised Horovod


def problem(world: World) -> str | None:
    """Why Horovod can't run here: not installed, hollow, built for another torch or another MPI, no MPI at all."""
    if importlib.util.find_spec("horovod") is None:
        return f"--collectives horovod: Horovod is not installed; {REMEDY}"
    library = extension()
    if library is None:
        return f"--collectives horovod: the installed Horovod is hollow (it has no torch extension); {REMEDY}"
    if world.comm is None:
        return "--collectives horovod: there is no MPI here; start with mpiexec, or use --collectives mpi"
    mixed = foreign_mpi(library)
    if mixed:
        return f"--collectives horovod: {mixed}; with this Python and MPI {REMEDY}"
    try:
        importlib.import_module("horovod.torch.mpi_lib_v2")
    except ImportError as error:
        return f"--collectives horovod: its extension does not load with torch {torch.__version__} ({error}); {REMEDY}"
    import horovod.torch as hvd

    if not hvd.mpi_built():
        return f"--collectives horovod: the installed Horovod is built without MPI; {REMEDY}"
    if hvd.is_initialized() and (hvd.rank(), hvd.size()) != (world.rank, world.size):
        return (
            f"--collectives horovod: hvd.init() made this rank {hvd.rank()} of {hvd.size()}; under MPI it is rank "
            f"{world.rank} of {world.size}. Initialise Horovod over all ranks, in MPI's order, or leave hvd.init() to hpcasync."
        )
    return None


def extension() -> Path | None:
    """The torch extension of the installed Horovod; None for a hollow one."""
    spec = importlib.util.find_spec("horovod")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for found in sorted(Path(folder, "torch").glob("mpi_lib_v2*.so")):
            return found
    return None


def foreign_mpi(library: Path, maps: Path = Path("/proc/self/maps")) -> str | None:
    """What is wrong if ``library`` wants another MPI library than this process has loaded: both at once crash.

    Read from the file before it is loaded.
    """
    wanted = {name.decode() for name in re.findall(rb"libmpi(?:_[a-z]\w*)?\.so\.\d+", library.read_bytes())}
    loaded = {Path(line.split()[-1]).name for line in maps.read_text().splitlines() if "/libmpi" in line}
    loaded = {name for name in loaded if re.match(r"libmpi(ch)?(_[a-z]\w*)?\.so", name)}
    if not wanted or not loaded or any(have.startswith(want) for want in wanted for have in loaded):
        return None
    return f"Horovod is built for {', '.join(sorted(wanted))}, but this process runs on {', '.join(sorted(loaded))}"


def open(world: World) -> HorovodCollectives:  # the name that every backend gives it
    """The backend over all ranks, on the user's ``hvd.init()`` if there was one. Collective."""
    return HorovodCollectives(world)


class _Handle:
    """A started operation of Horovod."""

    def __init__(self, hvd: Any, handle: int) -> None:
        self._hvd = hvd
        self._handle: int | None = handle

    def wait(self) -> None:
        if self._handle is not None:
            self._hvd.synchronize(self._handle)
            self._handle = None

    def test(self) -> bool:
        if self._handle is not None and self._hvd.poll(self._handle):
            self.wait()
        return self._handle is None


class HorovodCollectives(OverMPI):
    """Sums by Horovod's own thread, on the GPU where it is built for that; broadcast and barrier are MPI's.

    Args:
        world: the ranks. ``hvd.init()`` is called over them unless the user has.
    """

    def __init__(self, world: World) -> None:
        import horovod.torch as hvd

        global _users, _ours
        super().__init__(world.collectives)
        self._hvd = hvd
        # Without nccl it takes a tensor of a GPU through host memory itself; with nccl ranks can't share a GPU.
        self._on_gpu = own_gpus(world) if hvd.nccl_built() else bool(hvd.cuda_built())
        if not hvd.is_initialized():
            hvd.init(comm=world.comm)
            _ours = True
        _users += 1
        self._number = _users
        self._open = True
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no address in _names is given out again
        self._count = 0

    def buffers(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        if device.type == "cuda" and self._on_gpu:
            made = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        else:
            made = host_buffers(sizes, dtype, device)
        for buffer in made:
            if buffer.numel():
                self._names[buffer.data_ptr()] = f"hpcasync.{self._number}.buffer.{len(self._kept)}"
            self._kept.append(buffer)
        return made

    def start_allreduce(self, buffer: Buffer) -> Pending:
        if isinstance(buffer, Tensor) and buffer.device.type == "cuda":
            tensor = buffer
        else:
            tensor = torch.from_numpy(as_array(buffer))
        if not tensor.numel():
            return Done()
        name = self._names.get(tensor.data_ptr())
        if name is None:
            name = f"hpcasync.{self._number}.{self._count % NAMES}"
            self._count += 1
        return _Handle(self._hvd, self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def close(self) -> None:
        global _users, _ours
        if not self._open:
            return
        self._open = False
        self._names, self._kept = {}, []
        self._mpi.barrier()
        _users -= 1
        if _users == 0 and _ours:
            self._hvd.shutdown()
            _ours = False
