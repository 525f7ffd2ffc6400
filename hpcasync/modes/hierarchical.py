"""``Hierarchical``: asynchronous inside a node, K-step averages with block momentum among the nodes."""

from __future__ import annotations

import atexit
from typing import Any

import numpy as np
import torch

from hpcasync.comm import Collectives, Pending, World, agree, init, make_collectives
from hpcasync.comm.groups import free, split
from hpcasync.errors import UsageError
from hpcasync.modes.asynchronous import Async
from hpcasync.modes.base import Closure, OnNonfinite
from hpcasync.modes.block import BlockOptions, check_delay
from hpcasync.modes.buffers import average_buffers, broadcast_buffers
from hpcasync.modes.flat import Source
from hpcasync.modes.inside import layer_norms
from hpcasync.rules import Rule
from hpcasync.store import aligned_zeros


class Hierarchical(Async):
    """Groups of ranks, asynchronous inside a group, K-step averages among the groups. All that is collective in
    ``Async`` is collective over all ranks here.

    The ranks of a group (by default of a node) train through their shared window, as in ``Async``. After K steps of each
    rank the groups' models are averaged, with block momentum, as in ``KStep``: only the first rank of each group takes
    part in the sum. With ``delay=0`` all ranks wait for it. With ``delay=D`` nobody does: the first rank of a group takes
    a copy of the group's model, the sum goes on while all compute, and D steps later the group's model is moved by what
    the average has changed, so that the steps made meanwhile are kept.

    Every rank must take the same number of steps; ``hpcasync.data.loader`` sees to that.

    Args:
        params: a module, parameters, or parameter groups; groups may override the rule's hyper-parameters.
        rule: what a gradient does inside a group, see ``hpcasync.rules``.
        every: K, steps of a rank per average, or a schedule of it, see ``KStep``.
        block_momentum: mu, in [0, 1).
        nesterov: Nesterov's form of the block momentum.
        block_lr: factor on what the average changes, > 0.
        warm_start: so many first steps average after each step, without block momentum and without delay.
        inner_state: what an average does to the rule's vectors: ``"keep"`` each group's own, ``"average"`` or ``"reset"``
            them. The last two need ``delay=0``.
        delay: steps that an average may take while the ranks compute, less than K.
        groups: how many, a multiple of the nodes; by default one per node.
        collectives: what sums over the groups' first ranks, see ``KStep``.
        staleness: bound inside a group, see ``Async``.
        world: from ``hpcasync.init()``.
        model: whose buffers ``synchronize()`` averages, where ``params`` is not the module itself.
        on_nonfinite: ``"skip"`` the push of a gradient with NaN or infinity, or ``"abort"``.
        stall_seconds: warn every so often while waiting for slower ranks.

    Raises:
        UsageError: as ``Async`` and ``KStep``; a delay that is not below K; groups that do not fit the nodes.

    Source: Cong, Liu, MLHPC 2020, doi 10.1109/MLHPCAI4S51975.2020.00011 (M-AVG, the average); putting a late average
    in as a correction is our reconstruction after Overlap-Local-SGD (Wang, Liang, Joshi 2020, arXiv 2002.09539).
    """

    mode = "hierarchical"

    def __init__(
        self,
        params: Source,
        rule: Rule,
        *,
        every: int | str = 32,
        block_momentum: float = 0.0,
        nesterov: bool = False,
        block_lr: float = 1.0,
        warm_start: int = 0,
        inner_state: str = "keep",
        delay: int = 0,
        groups: int | None = None,
        collectives: str = "mpi",
        staleness: int | None = None,
        world: World | None = None,
        model: torch.nn.Module | None = None,
        on_nonfinite: OnNonfinite = "skip",
        stall_seconds: float = 60.0,
    ) -> None:
        self.options = BlockOptions(every, block_momentum, nesterov, block_lr, warm_start, inner_state)
        check_delay(delay, self.options)
        if delay and inner_state != "keep":
            raise UsageError(f"inner_state={inner_state!r} with delay={delay}: expected 'keep', or delay=0")
        if getattr(rule, "own_copy", False):
            raise UsageError(
                f"rule {rule.name!r} trains a copy per rank, which an average of the groups' shared models would drop; "
                "use mode async with it, or another rule"
            )
        self.everyone = init() if world is None else world
        facts = {**self.options.facts(), "delay": delay, "groups": groups, "the rule": getattr(rule, "name", rule)}
        agree(self.everyone, facts)
        group, self._heads, self.groups = split(self.everyone, groups)
        self.delay = delay
        self.averages = 0
        self._since = 0  # this rank's steps since the last average began
        self._pending: Pending | None = None  # on the first ranks of groups
        self.under_way = False  # on all ranks: an average has begun and not ended
        super().__init__(
            params,
            rule,
            staleness=staleness,
            world=group,
            model=model,
            on_nonfinite=on_nonfinite,
            stall_seconds=stall_seconds,
        )
        agree(self.everyone, {"the model's parameter shapes": [tuple(p.shape) for p in self.params]})
        if self._model is not None:
            broadcast_buffers(self._model, self.everyone)
        self._sum: Collectives | None = None
        if self._heads is not None:
            self._sum = make_collectives(collectives, self._heads)
            # The group's model as it was sent, the sum of the groups', the model after the last average, its momentum.
            self._sent, self._total, self._anchor, self._velocity = aligned_zeros(4, self.store.layout.total)
            self._watch = self.store.worker(0)  # reads for the average, not for this rank's model
        self._spread()
        if self._one and self.everyone.size > 1:
            atexit.register(self._close_at_exit)

    def step(self, closure: Closure | None = None) -> Any:
        """Push this rank's gradient to its group and pull the group's model; after the K-th, the average.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if any.
        """
        loss = super().step(closure)
        self._since += 1
        if self.under_way and self._since >= self.delay:
            self.under_way = False
            if self._pending is not None:
                self._timed(self._finish)
        elif self._pending is not None:
            self._pending.test()
        if self.options.due(self.steps, self._since):
            warm = self.options.warm(self.steps)
            if warm or not self.delay:
                self.average(plain=warm)
            else:
                self._since = 0
                self.averages += 1
                self.under_way = True
                if self._heads is not None:
                    self._timed(self._begin)
        return loss

    def average(self, *, plain: bool = False) -> None:
        """Average the groups' models now, while all ranks wait. Collective over all ranks.

        Args:
            plain: without block momentum and block learning rate.
        """
        self.share.start()
        self._check_open()
        self._since = 0
        self.under_way = False
        self.averages += 1
        with self.share.phase("communicate"):
            if self._pending is not None:
                self._finish()
        with self.share.phase("wait"):
            self._barrier()
            if self._sum is not None:
                self._sum.barrier()
        with self.share.phase("wait" if self._sum is None else "communicate"):
            if self._sum is not None:
                self.store.pull(self._watch, self._total)
                self._sum.allreduce(self._total)
                self.options.apply(self._total, self._anchor, self._velocity, self.groups, plain=plain)
                self.store.state[0] = self._total
                self._inner_state()
            self._barrier()
            self._pull_together()  # nobody pushes before all have read

    def synchronize(self) -> None:
        """Average what is left of a block, and give every rank of every group the same model and averaged buffers.

        Collective over all ranks.
        """
        if self._since or self.under_way:
            self.average()
        super().synchronize()

    def publish(self) -> None:
        """Make rank 0's model the shared one, in all groups, after changing it by hand. Collective over all ranks."""
        super().publish()
        self._spread()

    def state_dict(self) -> dict[str, Any]:
        """As ``Async.state_dict``, of this rank's group; on the first rank of a group with the block's momentum.

        The shared model is not in it: call ``synchronize()`` before, so that all groups have one.
        """
        packed = super().state_dict()
        own = packed["hpcasync"] | {"since": self._since, "averages": self.averages}
        if self._heads is not None:
            own["block"] = {"anchor": torch.from_numpy(self._anchor.copy()), "velocity": torch.from_numpy(self._velocity.copy())}
        packed["hpcasync"] = own
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, and publish rank 0's model with it. Collective over all ranks.

        Raises:
            UsageError: another rule's state, or another model's.
        """
        super().load_state_dict(state_dict)
        own = state_dict["hpcasync"]
        self._since, self.averages = own.get("since", 0), own.get("averages", 0)
        self._spread()
        block = own.get("block")
        if self._heads is not None and block is not None:
            for mine, saved in ((self._anchor, block["anchor"].numpy()), (self._velocity, block["velocity"].numpy())):
                if mine.shape != saved.shape:
                    raise UsageError(f"block state: found {saved.size} elements, expected {mine.size}")
                mine[:] = saved

    def settle(self) -> None:
        """End an average that is under way, between steps, so that what the groups have is all there is. Collective over all."""
        self._barrier()
        self.under_way = False
        if self._pending is not None:
            self._finish()
        self.everyone.collectives.barrier()
        self._barrier()

    def momentum_norms(self) -> dict[str, float]:
        """Euclidean norm of each parameter's block momentum, by name; nothing but on first ranks of groups."""
        return {} if self._heads is None else layer_norms(self._velocity, self.store.layout, self._flat.names)

    def block_state(self) -> dict[str, np.ndarray]:
        """The model after the last average and the block's momentum, flat, the same in all groups; on first ranks only."""
        return {} if self._heads is None else {"anchor": self._anchor, "velocity": self._velocity}

    def load_block(self, saved: dict[str, np.ndarray] | None, since: int, averages: int) -> None:
        """Go on inside a block: ``saved`` is what ``block_state`` gave, on rank 0 of all. Collective over all ranks."""
        self._since, self.under_way, self.averages = since, False, averages
        for name, mine in self.block_state().items():
            if self.everyone.rank == 0 and saved is not None:
                mine[:] = saved[name]
            assert self._heads is not None
            self._heads.collectives.broadcast(mine)
        self.everyone.collectives.barrier()

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        if self._sum is not None and self._heads is not None and self._sum is not self._heads.collectives:
            self._sum.close()
        for part in (self._heads, self.world):
            free(part, self.everyone)

    def _begin(self) -> None:
        """Send a copy of the group's model on its way."""
        assert self._sum is not None
        self.store.pull(self._watch, self._sent)
        self._total[:] = self._sent
        self._pending = self._sum.start_allreduce(self._total)

    def _finish(self) -> None:
        """Move the group's model by what the average has changed in the copy that was sent."""
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        self.options.apply(self._total, self._anchor, self._velocity, self.groups, plain=False)
        self._total -= self._sent
        self.store.add(self._watch, self._total)
        self._read()
        self._to_device()

    def _inner_state(self) -> None:
        """What an average does to the rule's vectors; the group waits."""
        assert self._sum is not None
        if self.options.inner_state == "reset":
            for row, vector in enumerate(self.rule.vectors, start=1):
                self.store.state[row] = vector.start
            self.store.versions[:] = 0
        elif self.options.inner_state == "average":
            for row in range(1, 1 + len(self.rule.vectors)):
                vector = self.store.state[row].copy()
                self._sum.allreduce(vector)
                self.store.state[row] = vector / self.groups

    def _spread(self) -> None:
        """Give all groups rank 0's model, and begin the blocks from it."""
        if self._heads is not None:
            self.store.pull(self._watch, self._anchor)
            self._heads.collectives.broadcast(self._anchor)
            self.store.state[0] = self._anchor
            self._velocity[:] = 0
        self._barrier()
        self._pull_together()

    def _synchronize_buffers(self) -> None:
        if self._model is not None:
            average_buffers(self._model, self.everyone)
