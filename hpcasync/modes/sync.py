"""``Sync``: the ranks' gradients are averaged, in buckets that start during backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcasync.comm import Collectives, Pending, World
from hpcasync.errors import UsageError
from hpcasync.modes.base import Closure, OnNonfinite
from hpcasync.modes.staging import Staged, on_host
from hpcasync.modes.wrapper import Wrapper


class _Bucket:
    """Some parameters of one dtype whose gradients travel together.

    The memory that is summed holds the gradients, then one flag per parameter (how many ranks have a gradient), then one flag
    per rank (whether its part is not finite), so that one sum tells all three. It lies on the host, with a buffer for the
    gradients beside it on a GPU, or on the GPU where the backend sums there.
    """

    def __init__(self, params: list[int], tensors: list[Tensor], memory: Tensor, rank: int) -> None:
        self.params = params
        self._rank = rank
        sizes = [t.numel() for t in tensors]
        self.memory = memory
        self._sums = memory[: sum(sizes)]
        self.direct = not on_host(memory)
        self._staged = None if self.direct else Staged.beside(self._sums, tensors[0].device)
        self.grads = self._sums if self._staged is None else self._staged.buffer
        self._flags = Staged(memory[sum(sizes) :])
        # numpy: single elements are read and written ten times faster than through torch
        self.present, self.nonfinite = np.split(self._flags.array, [len(sizes)])
        self.views = [v.view(t.shape) for v, t in zip(self.grads.split(sizes), tensors, strict=True)]
        self.missing = len(params)
        self.begun = False
        self.pending: Pending | None = None

    def begin(self) -> None:
        """All gradients are in place: bring them to where they are summed."""
        self.begun = True
        if self._staged is not None:
            self._staged.to_host()

    def ready(self) -> bool:
        """Whether all gradients lie where they are summed."""
        return self.begun and (self._staged is None or self._staged.arrived())

    def settle(self) -> float:
        """Wait for what still moves between the GPU and the host; returns seconds of copying."""
        return self._flags.wait() + (0.0 if self._staged is None else self._staged.wait())

    def start(self, collectives: Collectives) -> None:
        """Look whether this rank's part is finite, and start the sum."""
        if not self.direct and not _finite(self._sums):
            self.nonfinite[self._rank] = 1
        self._flags.to_device()
        if self.direct:  # found and noted there: the host need not know before the sum
            place = len(self.params) + self._rank
            self._flags.buffer[place] = torch.isfinite(self._sums).all().logical_not()
        self.pending = collectives.start_allreduce(self.memory)

    def average(self, ranks: int) -> None:
        """Make the sum the mean and see whether it is finite; begin to bring both to where they are read."""
        self.begun = False
        if self.direct:
            if ranks > 1:
                self._sums.div_(ranks)
                nonfinite = self._flags.buffer[len(self.params) :]
                nonfinite += torch.isfinite(self._sums).all().logical_not() & (nonfinite.sum() == 0)
            self._flags.to_host()
            return
        self._flags.to_host()
        self._flags.wait()
        if ranks > 1:
            self._sums.div_(ranks)
            if not self.nonfinite.any() and not _finite(self._sums):
                self.nonfinite[:] = 1  # finite on each rank, but their sum is not: all ranks see the same
        if self._staged is not None:
            self._staged.to_device()

    def hand_out(self, params: list[Tensor]) -> np.ndarray:
        """Give the parameters their mean gradient; returns per rank whether its part was not finite."""
        present = self.present.tolist()
        for j, i in enumerate(self.params):
            params[i].grad = self.views[j] if present[j] else None
        self.missing = len(self.params)
        bad = self.nonfinite.copy()
        self.present[:] = 0
        self.nonfinite[:] = 0
        return bad


class Sync(Wrapper):
    """Synchronous data parallelism: every step uses the mean of the ranks' gradients. Every call is collective.

    Gradients are averaged when ``backward()`` returns, so gradient clipping, ``GradScaler`` and closures see the mean.
    A parameter without a gradient on some ranks counts as zero there; without one on every rank it has none.

    Every rank must take the same number of steps; ``hpcasync.data.loader`` and ``ShardSampler`` see to that.

    Args:
        optimizer: any torch optimizer.
        world: from ``hpcasync.init()``.
        model: whose buffers ``synchronize()`` averages; without it they stay per rank.
        bucket_mb: bytes per bucket, in MB.
        collectives: what sums over the ranks: ``"mpi"``, ``"window"``, ``"torch"``, ``"horovod"``, or an object of
            ``hpcasync.comm.make_collectives``, which stays open.
        on_nonfinite: if any rank's gradient has NaN or infinity, all ``"skip"`` the step, or ``"abort"``.

    Raises:
        UsageError: no trainable parameter, a parameter neither float32 nor float64, ranks that disagree.

    Source: Li et al., PVLDB 13(12):3005, 2020 (buckets that start during backward, as torch's DistributedDataParallel).
    """

    mode = "sync"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        world: World | None = None,
        model: torch.nn.Module | None = None,
        bucket_mb: float = 4.0,
        collectives: str | Collectives = "mpi",
        on_nonfinite: OnNonfinite = "skip",
    ) -> None:
        if not bucket_mb > 0:
            raise UsageError(f"bucket_mb={bucket_mb!r}: expected a positive number")
        super().__init__(
            optimizer,
            world=world,
            model=model,
            on_nonfinite=on_nonfinite,
            collectives=collectives,
            facts={"bucket_mb": bucket_mb},
        )
        params = self.params
        self._buckets = _fill_buckets(params, bucket_mb * 2**20, self.world, self.collectives)
        self._place = {id(params[i]): (b, j) for b in self._buckets for j, i in enumerate(b.params)}
        self._started = 0  # buckets whose sum is under way; always the first ones, so that all ranks agree
        self._queued = False  # whether the end of this backward will call _finish
        self._synced = False
        self._enabled = True
        self._bad_ranks: list[int] = []
        self._hooks: dict[int, Any] = {}
        self._watch()

    def step(self, closure: Closure | None = None) -> Any:
        """Average what is not yet averaged, then let the wrapped optimizer step.

        Args:
            closure: re-evaluates the model and returns the loss; its gradients are averaged each time, and so is the
                loss, since line searches decide by it and all ranks must decide alike.

        Returns:
            The closure's loss, if any: the mean over the ranks.
        """
        self.share.start()
        self._watch()
        self.steps += 1
        if closure is not None:
            loss = self._step_with(self._averaging(closure), self._take_bad_ranks)
            self._synced = False
            return loss
        if not self._synced:
            self._finish()
        self._synced = False
        bad = self._take_bad_ranks()
        if bad:
            self._nonfinite(bad)
        else:
            self.inner.step()
            self.updates += 1
        return None

    def _watch(self) -> None:
        """Hook the parameters that need a gradient, those that were frozen before included."""
        for p in self.params:
            if p.requires_grad and id(p) not in self._hooks and not self._closed:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(self._on_grad)

    def _take_bad_ranks(self) -> str:
        ranks, self._bad_ranks = self._bad_ranks, []
        return f"rank {', '.join(map(str, ranks))}" if ranks else ""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._watch()
        self._synced = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank only; the next backward outside averages the accumulated ones."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def synchronize(self) -> None:
        """Average the buffers; parameters are equal anyway. Collective."""
        with self.share.phase("wait"):
            self.collectives.barrier()
        self._synchronize_buffers()
        self.share.stop()

    def close(self) -> None:
        """Remove the hooks from the parameters. Collective and idempotent."""
        super().close()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        for bucket in self._buckets:
            bucket.settle()

    def _averaging(self, closure: Closure) -> Closure:
        def averaged() -> Any:
            self._synced = False
            with torch.enable_grad():
                loss = closure()
            if not self._synced:
                self._finish()
            return self._mean(loss)

        return averaged

    def _mean(self, loss: Any) -> Any:
        if self.world.size == 1 or loss is None:
            return loss
        total = np.array([loss.item() if isinstance(loss, Tensor) else float(loss)])
        self.collectives.allreduce(total)
        mean = float(total[0]) / self.world.size
        return torch.full_like(loss.detach(), mean) if isinstance(loss, Tensor) else mean

    def _on_grad(self, p: Tensor) -> None:
        """A parameter's gradient is complete: put it into its bucket, start every bucket that is full and next."""
        if not self._enabled:
            self._synced = False  # a gradient of this rank alone: step() must average
            return
        if not self._queued:
            self._queued = True
            self._synced = False
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket, j = self._place[id(p)]
        if bucket.present[j] == 0:
            bucket.missing -= 1
        _store(bucket, j, p)
        if bucket.missing == 0 and not bucket.begun:
            bucket.begin()
        while self._started < len(self._buckets) and self._buckets[self._started].ready():
            self._start_next()
        for started in self._buckets[: self._started]:
            if started.pending is not None:
                started.pending.test()  # MPI moves only while it is called

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        self.share.add("copy", bucket.settle())
        bucket.start(self.collectives)
        self._started += 1

    @torch.no_grad()
    def _finish(self) -> None:
        """Sum what is left, wait for all buckets, and give every parameter the mean as its gradient."""
        params = self.params
        for bucket in self._buckets[self._started :]:
            for j, i in enumerate(bucket.params):
                if bucket.present[j]:
                    continue
                if params[i].grad is not None:
                    _store(bucket, j, params[i])  # from an earlier backward
                else:
                    bucket.views[j].zero_()  # the last mean still lies there
            if not bucket.begun:
                bucket.begin()
        while self._started < len(self._buckets):
            self._start_next()
        if self.world.size > 1:
            with self.share.phase("wait"):
                self.collectives.barrier()
        with self.share.phase("communicate"):
            for bucket in self._buckets:
                assert bucket.pending is not None
                bucket.pending.wait()
                bucket.pending = None
                bucket.average(self.world.size)
        bad = np.zeros(self.world.size)
        for bucket in self._buckets:
            if bucket.direct:
                self.share.add("copy", bucket.settle())  # of the flags, which the host must know
            bad += bucket.hand_out(params)
        self._bad_ranks = np.flatnonzero(bad).tolist()
        self._started = 0
        self._queued = False
        self._synced = True


def _store(bucket: _Bucket, j: int, p: Tensor) -> None:
    """Copy a gradient into its bucket, unless it lies there already."""
    grad, view = p.grad, bucket.views[j]
    assert grad is not None
    if grad.layout != torch.strided:
        raise UsageError("sparse gradient; expected a dense one (nn.Embedding(..., sparse=False))")
    if grad.dtype != view.dtype or grad.shape != view.shape:
        raise UsageError(
            f"a gradient is {grad.dtype} of shape {tuple(grad.shape)}; the optimizer was made for {view.dtype} of shape "
            f"{tuple(view.shape)}. Convert the model first, then make the optimizer."
        )
    if grad.data_ptr() != view.data_ptr():
        view.copy_(grad.detach())
    bucket.present[j] = 1


def _finite(values: Tensor) -> bool:
    # A sum is not finite if a term is not; the rare overflow of finite terms is settled element by element.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _fill_buckets(params: list[Tensor], limit: float, world: World, collectives: Collectives) -> list[_Bucket]:
    """Cut the parameters into buckets of about ``limit`` bytes, last parameters first: backward reaches them first."""
    buckets: list[_Bucket] = []
    for dtype in dict.fromkeys(p.dtype for p in params):
        shares: list[list[int]] = [[]]
        size = 0
        for i in reversed([i for i, p in enumerate(params) if p.dtype == dtype]):
            if size >= limit:
                shares.append([])
                size = 0
            shares[-1].append(i)
            size += params[i].numel() * params[i].element_size()
        sizes = [sum(params[i].numel() + 1 for i in share) + world.size for share in shares]
        memory = collectives.buffers(sizes, dtype, params[shares[0][0]].device)
        buckets += [_Bucket(share, [params[i] for i in share], m, world.rank) for share, m in zip(shares, memory)]
    return buckets
