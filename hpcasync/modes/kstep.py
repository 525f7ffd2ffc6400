"""``KStep``: local steps, and every K of them one average of the models with block momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm import Collectives, World, init
from hpcasync.errors import UsageError
from hpcasync.kernels import block_update
from hpcasync.modes.base import Closure, OnNonfinite
from hpcasync.modes.block import BlockOptions
from hpcasync.modes.finite import FiniteCheck, device_finite
from hpcasync.modes.flat import FlatParameters
from hpcasync.modes.inside import layer_norms
from hpcasync.modes.presets import preset_options
from hpcasync.modes.staging import Staged, on_host
from hpcasync.modes.wrapper import Wrapper
from hpcasync.store import make_layout


class _Block:
    """All parameters of one dtype: the flat model, the model after the last average, and the block momentum."""

    def __init__(self, named: list[tuple[Tensor, str]], collectives: Collectives) -> None:
        params, names = [p for p, _ in named], [n for _, n in named]
        layout = make_layout([p.numel() for p in params])
        (self._summed,) = collectives.buffers([layout.total], params[0].dtype, params[0].device)
        self._direct = not on_host(self._summed)  # the backend sums the model itself, on its GPU
        self._staged = Staged(self._summed) if self._direct else Staged.beside(self._summed, params[0].device)
        self.host = self._staged.array
        self.flat = FlatParameters(params, names, layout, self._staged.buffer)
        self.fetch()
        self.settle()
        self.anchor = self.host.copy()
        self.velocity = np.zeros_like(self.host)
        one = np.zeros((3, 1), self.host.dtype)
        block_update(*one, 1, 0.0, 1.0, False)  # load or compile the kernel now, so that no step pays for it

    def fetch(self) -> None:
        """Begin to bring the model to the host buffer."""
        self.flat.attach()
        self._staged.to_host()

    def settle(self) -> float:
        """Wait for what still moves between the GPU and the host; returns seconds of copying."""
        return self._staged.wait()

    def sum(self, collectives: Collectives) -> float:
        """Replace the host buffer, fetched before, by the sum over the ranks; returns seconds of copying."""
        collectives.allreduce(self._summed)
        if self._direct:
            self._staged.to_host()
        return self._staged.wait()

    def frozen(self) -> list[tuple[slice, np.ndarray]]:
        """Where the frozen parameters lie in the host buffer, and their values."""
        parts = [slice(start, start + size) for _, p, start, size in self.flat.places() if not p.requires_grad]
        return [(part, self.host[part].copy()) for part in parts]

    def keep(self, frozen: list[tuple[slice, np.ndarray]]) -> None:
        """Undo what an average did to the frozen parameters: rounding, or momentum from before they were frozen."""
        for part, values in frozen:
            self.host[part] = self.anchor[part] = values
            self.velocity[part] = 0

    def put_back(self) -> None:
        """Begin to bring the host buffer to the model."""
        self._staged.to_device()


class KStep(Wrapper):
    """K-step averaging with block momentum (M-AVG). Every K-th step is collective.

    Each rank makes K local steps; then, with ``d`` the mean of the ranks' models minus the model after the last average,
    ``v = mu v + lr d`` and ``w = w + v`` (with Nesterov: ``w = w + lr d + mu v``). ``block_momentum=0, block_lr=1`` is
    K-AVG, also called local SGD.

    Every rank must take the same number of steps; ``hpcasync.data.loader`` and ``ShardSampler`` see to that. Frozen
    parameters take no part in the average.

    Args:
        optimizer: any torch optimizer, for the local steps.
        every: K, local steps per average, >= 1; or a schedule such as ``"1:100,8:500,32"``: 1 for the first 100 steps,
            8 until step 500, then 32. A block that has begun keeps its K.
        block_momentum: mu, in [0, 1).
        nesterov: Nesterov's form of the block momentum.
        block_lr: factor on ``d``, > 0.
        warm_start: so many first steps average after each step, without block momentum (post-local SGD).
        inner_state: what an average does to the wrapped optimizer's state: ``"keep"`` each rank's own, ``"average"`` it,
            or ``"reset"`` it.
        collectives: what sums over the ranks: ``"mpi"``, ``"window"``, ``"torch"``, ``"horovod"``, or an object of
            ``hpcasync.comm.make_collectives``, which stays open.
        world: from ``hpcasync.init()``.
        model: whose buffers ``synchronize()`` averages; without it they stay per rank.
        on_nonfinite: ``"skip"`` a local step whose gradient has NaN or infinity, or ``"abort"``.

    Raises:
        UsageError: options out of range, no trainable parameter, a dtype that is not float32 or float64, ranks that
            disagree.

    Attributes:
        averages: made so far.
        averaging: the models are being summed, in place: no rank's own is whole.

    Source: Cong, Liu, MLHPC 2020, doi 10.1109/MLHPCAI4S51975.2020.00011 (block momentum); block learning rate as in
    BMUF; Nesterov form as DiLoCo's outer step.
    """

    mode = "kstep"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        every: int | str = 32,
        block_momentum: float = 0.0,
        nesterov: bool = False,
        block_lr: float = 1.0,
        warm_start: int = 0,
        inner_state: str = "keep",
        collectives: str | Collectives = "mpi",
        world: World | None = None,
        model: torch.nn.Module | None = None,
        on_nonfinite: OnNonfinite = "skip",
    ) -> None:
        self.options = BlockOptions(every, block_momentum, nesterov, block_lr, warm_start, inner_state)
        facts = self.options.facts()
        super().__init__(optimizer, world=world, model=model, on_nonfinite=on_nonfinite, collectives=collectives, facts=facts)
        self._check = FiniteCheck(self.params, self.world.threads)
        self.averages = 0
        self.averaging = False
        self._since = 0  # local steps since the last average
        self._blocks = [
            _Block([(p, n) for p, n in zip(self.params, self.names, strict=True) if p.dtype == dtype], self.collectives)
            for dtype in dict.fromkeys(p.dtype for p in self.params)
        ]

    @classmethod
    def preset(cls, name: str, optimizer: torch.optim.Optimizer, *, world: World | None = None, **overrides: Any) -> KStep:
        """A published method by its name: k-avg, m-avg, post-local, bmuf, slowmo, diloco.

        Args:
            name: a key of ``hpcasync.modes.presets.PRESETS``, where the settings and their sources are.
            optimizer: for the local steps; diloco is meant for ``torch.optim.AdamW``.
            world: from ``hpcasync.init()``.
            overrides: any other arguments of ``KStep``; they win over the preset's.

        Raises:
            UsageError: an unknown name, or an override that makes it another method.
        """
        world = init() if world is None else world
        return cls(optimizer, world=world, **preset_options(name, world.size, overrides))

    def step(self, closure: Closure | None = None) -> Any:
        """One local step; after the K-th, the average.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if any.
        """
        self.share.start()
        self.steps += 1
        loss = None
        if closure is not None:
            loss = self._step_with(closure, self._bad)
        elif not self._bad():
            self.inner.step()
            self.updates += 1
        else:
            self._nonfinite(f"rank {self.world.rank}")
        self._since += 1
        if self.options.due(self.steps, self._since):
            self.average(plain=self.options.warm(self.steps))
        return loss

    @torch.no_grad()
    def average(self, *, plain: bool = False) -> None:
        """Average the models now. Collective.

        Args:
            plain: without block momentum and block learning rate.
        """
        for block in self._blocks:
            block.fetch()
        if self.world.size > 1:
            with self.share.phase("wait"):
                self.collectives.barrier()
        self.share.add("copy", sum([block.settle() for block in self._blocks]))
        with self.share.phase("communicate"):
            self.averaging = True
            copying = 0.0
            for block in self._blocks:
                frozen = block.frozen()
                copying += block.sum(self.collectives)
                self.options.apply(block.host, block.anchor, block.velocity, self.world.size, plain=plain)
                block.keep(frozen)
                block.put_back()
            self.averaging = False
            self._since = 0
            self.averages += 1
            if self.options.inner_state == "reset":
                self.inner.state.clear()
            elif self.options.inner_state == "average":
                self._average_inner_state()
        self.share.add("copy", copying)
        self.share.add("communicate", -copying)

    def momentum_norms(self) -> dict[str, float]:
        """Euclidean norm of each parameter's block momentum, by name."""
        found: dict[str, float] = {}
        for block in self._blocks:
            found |= layer_norms(block.velocity, block.flat.layout, block.flat.names)
        return found

    def agreed(self) -> dict[str, Tensor]:
        """The model after the last average, by name: copies in host memory."""
        return {
            name: torch.from_numpy(block.anchor[start : start + size].copy()).view(p.shape)
            for block in self._blocks
            for name, p, start, size in block.flat.places()
        }

    def synchronize(self) -> None:
        """Average what is left of a block, and the buffers, so that all ranks have the same model. Collective."""
        self.share.start()
        if self._since:
            self.average()
        self._synchronize_buffers()
        self.share.stop()

    def close(self) -> None:
        super().close()
        self._check.close()
        for block in self._blocks:
            block.settle()

    def _bad(self) -> str:
        """This rank by name if its gradient is not finite, else nothing."""
        good = all([self._finite(p) for p in self.params if p.device.type == "cpu"])
        good &= device_finite([p.grad for p in self.params if p.grad is not None and p.device.type != "cpu"])
        self._check.forget()
        return "" if good else f"rank {self.world.rank}"

    def _finite(self, p: Tensor) -> bool:
        g = p.grad
        if g is None:
            return True
        if g.layout == torch.strided and g.dtype == torch.float32 and g.is_contiguous():
            return self._check.finite(p, g.detach().reshape(-1).numpy())
        values = g if g.layout == torch.strided else g.coalesce().values()
        return bool(torch.isfinite(values).all())

    def _average_inner_state(self) -> None:
        """Average the tensors of the wrapped optimizer's state over the ranks that have them; counters, scalars, stay.

        A rank may lack some: it has skipped its steps so far, or had no gradient for a parameter.
        """
        if self.world.size == 1:
            return
        mine = {
            (i, name): value
            for i, p in enumerate(self.params)
            for name, value in self.inner.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.dim() and value.is_floating_point()
        }
        everyone = self.world.gather({k: (v.numel(), v.dtype == torch.float64) for k, v in mine.items()})
        for key, (size, double) in sorted({k: v for theirs in everyone for k, v in theirs.items()}.items()):
            host = torch.zeros(size, dtype=torch.float64 if double else torch.float32)
            if key in mine:
                host.copy_(mine[key].detach().reshape(-1))
            self.collectives.allreduce(host)
            if key in mine:
                holders = sum(key in theirs for theirs in everyone)
                mine[key].copy_((host / holders).view(mine[key].shape))

    def _own_state(self) -> dict[str, Any]:
        blocks = [
            {"anchor": torch.from_numpy(b.anchor.copy()), "velocity": torch.from_numpy(b.velocity.copy())} for b in self._blocks
        ]
        return {**super()._own_state(), "since": self._since, "averages": self.averages, "blocks": blocks}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        super()._load_own_state(own)
        self._since, self.averages = own["since"], own["averages"]
        for block, theirs in zip(self._blocks, own["blocks"], strict=True):
            for name in ("anchor", "velocity"):
                mine, saved = getattr(block, name), theirs[name].numpy()
                if mine.shape != saved.shape:
                    raise UsageError(f"block {name}: found {saved.size} elements, expected {mine.size}")
                mine[:] = saved
