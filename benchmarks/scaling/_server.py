"""What the field writes by hand: a master that holds the model, and workers that send it gradients, two-sided in mpi4py."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from torch import nn

STOP = 1  # tag of a worker's farewell


class Flat:
    """Parameters and gradients as views of two contiguous buffers, so that nothing has to be packed."""

    def __init__(self, model: nn.Module) -> None:
        params = list(model.parameters())
        self.w = torch.cat([p.detach().reshape(-1) for p in params])
        self.g = torch.zeros_like(self.w)
        at = 0
        for p in params:
            p.data = self.w[at : at + p.numel()].view_as(p)
            p.grad = self.g[at : at + p.numel()].view_as(p)
            at += p.numel()


class Worker:
    """A rank below the last: computes gradients, exchanges them for parameters."""

    def __init__(self, comm: Any, model: nn.Module) -> None:
        self._comm, self._master, self.flat = comm, comm.size - 1, Flat(model)

    def zero_grad(self) -> None:
        self.flat.g.zero_()

    def step(self) -> None:
        """Push and pull."""
        answer = self._comm.Irecv(self.flat.w.numpy(), source=self._master)
        self._comm.Send(self.flat.g.numpy(), dest=self._master)
        _wait(answer.Test)

    def close(self) -> None:
        self._comm.Send(np.zeros(0, np.float32), dest=self._master, tag=STOP)


def serve(comm: Any, model: nn.Module, lr: float) -> None:
    """The last rank: apply every gradient as it comes, in one pass, and answer with the parameters, until all have left."""
    from mpi4py import MPI

    flat, status = Flat(model), MPI.Status()
    there = comm.size - 1
    while there:
        _wait(lambda: comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status))
        source = status.Get_source()
        comm.Recv(flat.g.numpy(), source=source, tag=status.Get_tag())
        if status.Get_tag() == STOP:
            there -= 1
            continue
        flat.w.add_(flat.g, alpha=-lr)
        comm.Send(flat.w.numpy(), dest=source)  # of these bits: it ends before the next gradient is applied


def _wait(done: Any) -> None:
    """Poll; the core is given away, since ranks may be more than cores."""
    spins = 0
    while not done():
        spins += 1
        if spins < 2000:
            os.sched_yield()
        else:
            time.sleep(5e-5)
