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
from hpcasync.modes.wrapper import Wrapper


class _Bucket:
    """Some parameters of one dtype whose gradients travel together.

    The buffer holds the gradients, then one flag per parameter (how many ranks have a gradient), then one flag per rank
    (whether its part is not finite), so that one sum tells all three.
    """

    def __init__(self, params: list[int], tensors: list[Tensor], buffer: Tensor) -> None:
        self.params = params
        sizes = [t.numel() for t in tensors]
        self.buffer = buffer
        self.grads = grads = self.buffer[: sum(sizes)]
        self._flags = buffer[sum(sizes) :]
        self._host_flags = self._flags if buffer.device.type == "cpu" else torch.zeros_like(self._flags, device="cpu")
        # numpy: single elements are read and written ten times faster than through torch
        self.present, self.nonfinite = np.split(self._host_flags.numpy(), [len(sizes)])
        self.views = [v.view(t.shape) for v, t in zip(grads.split(sizes), tensors, strict=True)]
        self.missing = len(params)
        self.pending: Pending | None = None
        self._copies = torch.cuda.Stream(tensors[0].device) if tensors[0].device != buffer.device else None

    def copy(self, j: int, grad: Tensor) -> None:
        """Put a gradient into its place: from a GPU to host memory on a stream of its own, beside the computation."""
        if self._copies is None:
            self.views[j].copy_(grad)
            return
        self._copies.wait_stream(torch.cuda.current_stream(grad.device))
        with torch.cuda.stream(self._copies):
            self.views[j].copy_(grad, non_blocking=True)
        grad.record_stream(self._copies)

    def settle(self) -> None:
        """Wait for what still moves between the GPU and host memory."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
            self._copies.synchronize()

    def send_flags(self) -> None:
        """Bring the flags to where they are summed."""
        if self._flags is not self._host_flags:
            self._flags.copy_(self._host_flags)

    def fetch_flags(self) -> None:
        """Bring the sums of the flags back."""
        if self._flags is not self._host_flags:
            self._host_flags.copy_(self._flags)


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
        self._buckets = _fill_buckets(params, bucket_mb * 2**20, self.world.size, self.collectives)
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
        while self._started < len(self._buckets) and self._buckets[self._started].missing == 0:
            self._start_next()
        for started in self._buckets[: self._started]:
            if started.pending is not None:
                started.pending.test()  # MPI moves only while it is called

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        bucket.settle()
        if not _finite(bucket.grads):
            bucket.nonfinite[self.world.rank] = 1
        bucket.send_flags()
        bucket.pending = self.collectives.start_allreduce(bucket.buffer)
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
                    bucket.settle()
                    bucket.views[j].zero_()  # the last mean still lies there
        while self._started < len(self._buckets):
            self._start_next()
        if self.world.size > 1:
            with self.share.phase("wait"):
                self.collectives.barrier()
        with self.share.phase("communicate"):
            bad = np.zeros(self.world.size)
            for bucket in self._buckets:
                assert bucket.pending is not None
                bucket.pending.wait()
                bucket.pending = None
                bad += self._hand_out(bucket, params)
        self._bad_ranks = np.flatnonzero(bad).tolist()
        self._started = 0
        self._queued = False
        self._synced = True

    def _hand_out(self, bucket: _Bucket, params: list[Tensor]) -> np.ndarray:
        """Give the bucket's parameters their mean gradient; returns per rank whether its part was not finite."""
        bucket.fetch_flags()
        if self.world.size > 1:
            bucket.grads.div_(self.world.size)
            if not bucket.nonfinite.any() and not _finite(bucket.grads):
                bucket.nonfinite[:] = 1  # finite on each rank, but their sum is not: all ranks see the same
        present = bucket.present.tolist()
        for j, i in enumerate(bucket.params):
            p, view = params[i], bucket.views[j]
            if not present[j]:
                p.grad = None
            else:
                p.grad = view.to(p.device, non_blocking=True)  # the view itself where it lies there
        bucket.missing = len(bucket.params)
        bad = bucket.nonfinite.copy()
        bucket.present[:] = 0
        bucket.nonfinite[:] = 0
        return bad


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
        bucket.copy(j, grad.detach())
    bucket.present[j] = 1


def _finite(values: Tensor) -> bool:
    # A sum is not finite if a term is not; the rare overflow of finite terms is settled element by element.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _fill_buckets(params: list[Tensor], limit: float, ranks: int, collectives: Collectives) -> list[_Bucket]:
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
        sizes = [sum(params[i].numel() + 1 for i in share) + ranks for share in shares]
        memory = collectives.buffers(sizes, dtype, params[shares[0][0]].device)
        buckets += [_Bucket(share, [params[i] for i in share], b) for share, b in zip(shares, memory)]
    return buckets
