"""Whether gradients hold NaN or infinity, looked at while backward has them in the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcasync.kernels import all_finite, team

HOOK_ELEMENTS = 1 << 16
"""Size from which looking during backward pays: a hook costs some microseconds, a small gradient is still in the cache later."""


class FiniteCheck:
    """Checks each gradient once, large ones as soon as autograd has them; ``step()`` then reads the answer.

    A gradient that was changed since (clipping, unscaling, a second backward) is checked again.

    Args:
        params: whose gradients.
        threads: for large gradients.
    """

    def __init__(self, params: list[Tensor], threads: int) -> None:
        self._threads = threads
        self._known: dict[int, tuple[int, int, bool]] = {}  # parameter -> gradient's address and version, answer
        large = [p for p in params if p.requires_grad and p.numel() >= HOOK_ELEMENTS]
        self._hooks = [p.register_post_accumulate_grad_hook(self._look) for p in large]

    def finite(self, p: Tensor, grad: np.ndarray) -> bool:
        """Whether ``grad``, the host array of ``p.grad``, is finite."""
        known = self._known.get(id(p))
        if known is not None and p.grad is not None and known[:2] == (p.grad.data_ptr(), p.grad._version):
            return known[2]
        return self._check(grad)

    def forget(self) -> None:
        """Drop all answers: the step is over, and a later gradient may lie at the same address."""
        self._known.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, p: Tensor) -> None:
        grad = p.grad
        if grad is None or grad.layout != torch.strided or grad.device.type != "cpu" or grad.dtype != torch.float32:
            return
        if grad.is_contiguous():
            answer = self._check(grad.detach().reshape(-1).numpy())
            self._known[id(p)] = (grad.data_ptr(), grad._version, answer)

    def _check(self, grad: np.ndarray) -> bool:
        if self._threads > 1 and grad.size > team.CHUNK:
            return team.finite(self._threads, grad)
        return bool(all_finite(grad))



def device_finite(grads: list[Tensor]) -> bool:
    """Whether gradients on a GPU are finite, for one wait of the host per dtype."""
    dense = [g.detach() if g.layout == torch.strided else g.detach().coalesce().values() for g in grads]
    if not dense:
        return True
    # A norm is not finite if an element is not; the rare overflow of finite ones is settled element by element.
    norms = torch._foreach_norm(dense)
    kinds = {n.dtype for n in norms}
    if all([bool(torch.isfinite(torch.stack([n for n in norms if n.dtype == kind])).all()) for kind in kinds]):
        return True
    return bool(torch.stack([torch.isfinite(g).all() for g in dense]).all())
