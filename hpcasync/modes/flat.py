"""Parameters as views of one flat buffer, and what to do when something un-shares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcasync.errors import UsageError
from hpcasync.store.layout import Layout

Source = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]]


def groups_of(
    source: Source, model: nn.Module | None = None
) -> tuple[list[dict[str, Any]], list[str], nn.Module | None]:
    """Parameter groups, parameter names and the module, from whatever a torch optimizer takes, or a module.

    Args:
        source: the module, parameters, or groups.
        model: names the parameters where ``source`` is not the module.

    Raises:
        UsageError: no parameters, or none that is trainable.
    """
    module = source if isinstance(source, nn.Module) else None
    if isinstance(source, Tensor):
        raise UsageError("found one tensor; expected a module, an iterable of parameters, or parameter groups")
    items: list[Any] = list(source.parameters() if isinstance(source, nn.Module) else source)
    groups = [dict(g, params=_listed(g["params"])) if isinstance(g, dict) else g for g in items]
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    params = [p for g in groups for p in g["params"]]
    named = module if module is not None else model
    names = {id(p): n for n, p in named.named_parameters()} if named is not None else {}
    if not any(isinstance(p, Tensor) and p.requires_grad for p in params):
        what = type(module).__name__ if module is not None else "the parameter list"
        raise UsageError(f"{what} has no trainable parameter ({len(params)} parameters): nothing to train")
    return groups, [names.get(id(p), f"parameter {i}") for i, p in enumerate(params)], module


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def check_dtypes(params: Sequence[Tensor], names: Sequence[str], allowed: Sequence[torch.dtype], mode: str) -> None:
    """Raise ``UsageError`` for a parameter that ``mode`` can't take."""
    for p, name in zip(params, names, strict=True):
        if p.dtype not in allowed:
            ok = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise UsageError(
                f"{name} is {str(p.dtype).removeprefix('torch.')}, mode {mode} takes {ok} parameters: "
                "convert the model (model.float()) and use autocast for lower precision"
            )


class FlatParameters:
    """Keeps parameters as views of one flat buffer.

    ``model.to()``, ``load_state_dict(assign=True)`` and the like replace a parameter's storage; ``attach`` notices,
    copies the new values into the buffer and makes the view again.

    Args:
        params: the parameters, all of the buffer's dtype and device.
        names: theirs, for messages.
        layout: where each lies in the buffer.
        buffer: 1-D tensor of ``layout.total`` elements.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str], layout: Layout, buffer: Tensor) -> None:
        self.params, self.names, self.layout, self.buffer = list(params), list(names), layout, buffer
        size = buffer.element_size()
        self._pointers = [buffer.data_ptr() + size * start for start in layout.starts]
        self._versions = 0
        self.attach()
        self.mark()

    def attach(self) -> bool:
        """Make every parameter a view of the buffer again; returns whether one was not.

        Raises:
            UsageError: a parameter has changed its dtype, device or size.
        """
        changed = False
        for i, (p, pointer) in enumerate(zip(self.params, self._pointers, strict=True)):
            if (p.data_ptr() == pointer and p.is_contiguous()) or not self.layout.sizes[i]:
                continue
            start, size = self.layout.starts[i], self.layout.sizes[i]
            if p.dtype != self.buffer.dtype or p.device != self.buffer.device or p.numel() != size:
                raise UsageError(
                    f"{self.names[i]} is now {p.dtype} on {p.device} with {p.numel()} elements; the optimizer was "
                    f"made for {self.buffer.dtype} on {self.buffer.device} with {size}. Convert the model first, "
                    "then make the optimizer."
                )
            view = self.buffer[start : start + size].view(p.shape)
            view.copy_(p.detach())
            p.data = view
            changed = True
        return changed

    def places(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """Name, parameter, start and size of each in the buffer."""
        return zip(self.names, self.params, self.layout.starts, self.layout.sizes, strict=True)

    def mark(self) -> None:
        """Take the present values as known, for ``changed_outside``."""
        self._versions = self._count()

    def changed_outside(self) -> bool:
        """Whether something else than the owner of the buffer wrote to a parameter in place since ``mark``."""
        return self._count() != self._versions

    def _count(self) -> int:
        return sum(p._version for p in self.params)


def check_dense(grad: Tensor, name: str) -> Tensor:
    """``grad`` as it is.

    Raises:
        UsageError: it is sparse.
    """
    if grad.layout != torch.strided:
        raise UsageError(f"{name} has a sparse gradient; expected a dense one (nn.Embedding(..., sparse=False))")
    return grad


def flat_grad(p: Tensor, name: str) -> np.ndarray | None:
    """The gradient of ``p``, which is on the CPU, as a flat float32 array, without a copy where the layout allows; or None.

    Raises:
        UsageError: a sparse gradient.
    """
    if p.grad is None:
        return None
    grad = check_dense(p.grad, name)
    array: np.ndarray = (grad.detach() if grad.requires_grad else grad).numpy().reshape(-1)
    return array
