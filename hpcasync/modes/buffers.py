"""Module buffers (BatchNorm statistics and the like): equal at the start, averaged when the ranks synchronise.

Between two synchronisations every rank keeps its own running statistics, as in DistributedDataParallel without buffer
broadcast. Floating buffers are averaged over the ranks; others (counters) are taken from rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcasync.comm import World, agree


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0. Collective.

    Raises:
        UsageError: ranks whose buffers differ in name, shape or dtype.
    """
    if world.size > 1:
        shapes = [(name, tuple(b.shape), str(b.dtype)) for name, b in model.named_buffers()]
        agree(world, {"the model's buffers": shapes})
        for buffer in model.buffers():
            broadcast(buffer, world)


def average_buffers(model: nn.Module, world: World) -> None:
    """Average floating buffers over the ranks, take the others from rank 0. Collective."""
    if world.size == 1:
        return
    floating = [b for b in model.buffers() if b.is_floating_point()]
    if floating:
        flat = torch.cat([b.detach().reshape(-1).to("cpu", torch.float64) for b in floating])
        world.collectives.allreduce(flat.numpy())
        flat /= world.size
        for buffer, mean in zip(floating, flat.split([b.numel() for b in floating]), strict=True):
            buffer.copy_(mean.view(buffer.shape))
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            broadcast(buffer, world)


def broadcast(tensor: Tensor, world: World) -> None:
    """Give every rank the tensor of rank 0, in place. Collective."""
    host = tensor.detach().to("cpu", copy=True).contiguous()
    if host.numel():
        world.collectives.broadcast(host.view(-1).view(torch.uint8).numpy())
        with torch.no_grad():
            tensor.copy_(host)
