"""``HPCAsyncStrategy``: a Lightning strategy whose ranks are MPI's and whose optimizer is a mode."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from hpcasync.comm import World, init
from hpcasync.errors import UsageError
from hpcasync.lightning.embed import KEY, embed, extract
from hpcasync.lightning.environment import WorldEnvironment
from hpcasync.modes import Mode, Sync
from hpcasync.modes.buffers import broadcast
from hpcasync.modes.from_torch import check_mode, make_mode, share_groups
from hpcasync.modes.state import idle
from hpcasync.modes.wrapper import Wrapper
from hpcasync.rules import Rule

_METHODS = ("average", "load_state_dict", "no_sync", "publish", "state_dict", "synchronize", "zero_grad")

_open: Mode | None = None
"""The mode of the last fit, where its window is kept for a checkpoint after it; the next fit or the end closes it."""


class HPCAsyncStrategy(ParallelStrategy):
    """``Trainer(strategy=HPCAsyncStrategy("async"))``: the ranks that mpiexec started train together.

    The module's ``configure_optimizers`` says parameters, groups, learning rate and schedule, as ever, and returns one torch
    optimizer. Modes ``sync`` and ``kstep`` wrap it. Modes ``async`` and ``hierarchical`` apply gradients in the shared window
    with a rule whose base step is the optimizer's (SGD, RMSprop, Adagrad, Adam, AdamW).

    Every rank gets its share of the data (``DistributedSampler``, put in by Lightning), all start from rank 0's model. The
    ranks meet at every validation and checkpoint and at the end: all have the same model then (``synchronize()``). In mode
    kstep that ends a block of local steps early; in async it waits for the slowest rank.

    Gradient clipping sees the mean in mode sync, else each rank's own gradient. Log validation metrics with
    ``sync_dist=True``; ``torchmetrics`` meet by themselves.

    Args:
        mode: ``"async"``, ``"sync"``, ``"kstep"`` or ``"hierarchical"``.
        rule: a rule's name, or a rule; by default ``asgd`` in the asynchronous modes, and the optimizer itself in the others.
        rule_options: what the rule has beside the optimizer's own, such as ``{"shrink": 0.3}``.
        world: from ``hpcasync.init()``.
        accelerator: see Lightning's ``Strategy``; as ``checkpoint_io`` and ``precision_plugin``.
        checkpoint_io: see ``accelerator``.
        precision_plugin: see ``accelerator``.
        options: those of the mode's class, such as ``staleness=16`` or ``every=8, block_momentum=0.5``.

    Attributes:
        world: the ranks.
        optimizer: the mode, once a fit has begun: staleness, updates, where the time went.

    Raises:
        UsageError: unknown mode, rule or option. A fit raises it for what this strategy can't do: several optimizers,
            ``sync_batchnorm``, checkpoints on an exception, an optimizer without a rule.
    """

    strategy_name = "hpcasync"
    optimizers: list[Any]

    def __init__(
        self,
        mode: str = "async",
        *,
        rule: str | Rule | None = None,
        rule_options: Mapping[str, Any] | None = None,
        world: World | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **options: Any,
    ) -> None:
        check_mode(mode, options)
        self.world = init() if world is None else world
        super().__init__(
            accelerator=accelerator,
            cluster_environment=WorldEnvironment(self.world),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.optimizer: Mode | None = None
        self._mode, self._rule, self._rule_options, self._options = mode, rule, rule_options, options
        self._configured: torch.optim.Optimizer | None = None
        self._fitting = False
        self._failure: BaseException | None = None
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.world.rank

    @property
    def root_device(self) -> torch.device:
        devices = self.parallel_devices or [self.world.device]
        return devices[self.world.local_rank % len(devices)]

    @property
    def is_distributed(self) -> bool:
        """Lightning asks before it gives each rank a share of the data and means of the metrics."""
        return self.world.size > 1

    @property
    def num_nodes(self) -> int:
        return self.world.nodes

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count not in (1, self.world.nodes):
            raise UsageError(f"Trainer(num_nodes={count}): mpiexec started ranks on {self.world.nodes}; leave num_nodes out")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world.size, "rank": self.world.rank}

    def setup(self, trainer: Trainer) -> None:
        self._failure = None
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        if self._fitting:
            self._refuse(trainer)
            _close_last()
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the model, give all ranks rank 0's, and let its metrics meet. Collective."""
        module = self._module
        module.to(self.root_device)
        self.world = replace(self.world, device=self.root_device)
        if self.world.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                broadcast(tensor, self.world)
            for metric in module.modules():
                if isinstance(metric, Metric) and metric.dist_sync_fn is None:
                    metric.dist_sync_fn, metric.distributed_available_fn = self._gather_metric, lambda: True

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the mode from the optimizer that the module configures. Collective."""
        global _open
        super().setup_optimizers(trainer)
        found = self.optimizers
        names = ", ".join(type(o).__name__ for o in found if o.param_groups)  # Lightning's stand-in for None has no groups
        if len(found) != 1 or not names or not isinstance(found[0], torch.optim.Optimizer):
            raise UsageError(
                f"configure_optimizers gave {names or 'no optimizer'}: expected one torch optimizer; put all parameters into "
                "groups of one"
            )
        self._configured = found[0]
        self.optimizer = _open = make_mode(
            self._mode,
            found[0],
            rule=self._rule,
            rule_options=self._rule_options,
            options=self._options,
            world=self.world,
            model=self._module,
        )
        self.optimizers = [self.optimizer]

    def on_train_start(self) -> None:
        # Lightning's wrapper is an object of its own with the methods of the mode's class: what they write would be lost.
        mode = self._running
        for wrapper in self._lightning_optimizers:
            for name in _METHODS:
                if hasattr(mode, name):
                    setattr(wrapper, name, getattr(mode, name))

    def on_validation_start(self) -> None:
        if self._fitting:
            self._running.synchronize()

    def on_validation_end(self) -> None:
        """Warn of what was logged of this rank alone; Lightning does so only under torch.distributed."""
        results = self._module.trainer._results
        for metric in results.values() if results is not None and self.world.size > 1 else ():
            if metric.is_tensor and metric.meta.on_epoch and not metric.meta.sync.should and not metric.meta.sync.rank_zero_only:
                rank_zero_warn(
                    f"{metric.meta.name!r} was logged of each rank's share of the validation data alone: use "
                    f"self.log({metric.meta.name!r}, ..., sync_dist=True)"
                )

    def on_train_end(self) -> None:
        self._running.synchronize()

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        if isinstance(self.optimizer, Sync):
            with self.optimizer.no_sync():
                yield
        else:
            yield

    def barrier(self, name: str | None = None) -> None:
        with self._meeting():
            self.world.collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world.comm is None:
            return obj
        with self._meeting():
            return self.world.comm.bcast(obj, root=src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean, sum, min or max of a tensor over the ranks, on every rank; what is no tensor comes back as it is.

        Raises:
            UsageError: another operation.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        name = str(getattr(reduce_op, "name", reduce_op) or "mean").lower()
        operations: dict[str, Any] = {"mean": _mean, "avg": _mean, "sum": _sum, "min": torch.amin, "max": torch.amax}
        if name not in operations:
            raise UsageError(f"reduce_op={reduce_op!r}: expected one of {', '.join(operations)}")
        return operations[name](torch.stack(self._gather_metric(tensor)), 0)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The ranks' tensors, of equal shapes, stacked: (ranks, ...); with one rank the tensor as it is."""
        if sync_grads:
            raise UsageError("all_gather(sync_grads=True): gradients don't flow between ranks here; leave it out")
        return tensor if self.world.size == 1 else torch.stack(self._gather_metric(tensor))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        with self._meeting():
            votes = self.world.gather(bool(decision))
        return sum(votes) == len(votes) if all else any(votes)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model that all ranks share, which all have from here on. Collective while fitting."""
        if self._fitting and self.optimizer is not None:
            self.optimizer.synchronize()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As torch has it, for other strategies: the wrapped optimizer's, or the rule's vectors."""
        mode = self._running
        return mode.inner.state_dict() if isinstance(mode, Wrapper) else mode.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file on rank 0, with the state of all ranks. Collective."""
        if "optimizer_states" in checkpoint and self.optimizer is not None:
            embed(checkpoint, self.optimizer)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore all ranks' state; of another strategy's checkpoint the wrapped optimizer's, in modes sync and kstep.

        Raises:
            UsageError: see ``extract``.
        """
        mode = self._running
        assert self._configured is not None
        if KEY not in checkpoint and isinstance(mode, Wrapper) and mode.inner is self._configured:
            mode.inner.load_state_dict(checkpoint["optimizer_states"][0])
            mode._share_inner()
        else:
            reset = extract(checkpoint, mode)
            if reset:
                rank_zero_warn(f"the checkpoint is of another number of ranks; begun anew: {'; '.join(reset)}")
        share_groups(self._configured, mode)

    def on_exception(self, exception: BaseException) -> None:
        self._failure = exception

    def teardown(self) -> None:
        """End the fit; of a failed one nothing, since the others may not come: the error ends the job."""
        global _open
        mode, fitting, self._fitting = self.optimizer, self._fitting, False
        if self._failure is None and fitting and isinstance(mode, Wrapper):
            mode.close()
            _open = None
        super().teardown()
        if isinstance(self._failure, SystemExit):
            # Lightning raises it for SIGTERM, perhaps on this rank only; called, it ends the job of the others too.
            sys.exit(self._failure.code or 128 + signal.SIGTERM)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _running(self) -> Mode:
        assert self.optimizer is not None
        return self.optimizer

    @contextmanager
    def _meeting(self) -> Generator[None, None, None]:
        """Inside, nobody waits for this rank's gradients while it waits for the others."""
        if self._fitting and self.optimizer is not None:
            with idle(self.optimizer):
                yield
        else:
            yield

    def _gather_metric(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        with self._meeting():
            return [t.to(tensor.device) for t in self.world.gather(tensor.detach().cpu())]

    def _refuse(self, trainer: Trainer) -> None:
        """Raise ``UsageError`` for what would hang or be wrong."""
        if self._layer_sync is not None:
            raise UsageError(
                "Trainer(sync_batchnorm=True) needs torch.distributed; leave it out: running statistics are averaged "
                "whenever the ranks meet"
            )
        for callback in trainer.callbacks:
            if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
                raise UsageError(
                    f"{type(callback).__name__}: a checkpoint on an exception needs all ranks, which may never come; use "
                    f"{ModelCheckpoint.__name__}(every_n_train_steps=...)"
                )


def _mean(stacked: Tensor, dim: int) -> Tensor:
    return stacked.mean(dim, dtype=stacked.dtype if stacked.is_floating_point() else torch.get_default_dtype())


def _sum(stacked: Tensor, dim: int) -> Tensor:
    return stacked.sum(dim)


def _close_last() -> None:
    """Free the window of the last fit. Collective."""
    global _open
    if _open is not None:
        _open.close()
        _open = None
