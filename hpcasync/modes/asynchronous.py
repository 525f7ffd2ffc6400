"""``Async``: every rank applies its gradients to the shared parameters as they come."""

from __future__ import annotations

import atexit
import time
import warnings
from typing import Any

import numpy as np
import torch

from hpcasync.comm import World, agree
from hpcasync.comm.failure import leaving_in_error
from hpcasync.comm.progress_choice import chosen_progress
from hpcasync.errors import UsageError
from hpcasync.modes import torch_state
from hpcasync.modes.base import Closure, Mode, OnNonfinite
from hpcasync.modes.finite import FiniteCheck
from hpcasync.modes.flat import FlatParameters, Source, check_dtypes, flat_grad, groups_of
from hpcasync.modes.inside import shrink_shares
from hpcasync.modes.recorder import Event, Recorder
from hpcasync.modes.staging import Staged, StagedGradients, apart
from hpcasync.rules import Rule
from hpcasync.rules.base import between
from hpcasync.store import IDLE, LocalStore, RemoteStore, Store, WindowStore, aligned_zeros, make_layout, shard_size
from hpcasync.store.layout import SHARD_ELEMENTS, Layout


class Async(Mode):
    """Asynchronous training through shared memory. Constructor, ``synchronize`` and ``close`` are collective.

    ``step()`` applies this rank's gradient to the shared parameters with the rule, in place, and reads the others' work
    into this rank's model in the same pass. No rank waits for another, except for a lock of a shard and for the bound on
    staleness. All ranks start from rank 0's model. Ranks may take different numbers of steps.

    Parameters without a gradient in a step are only read. Buffers stay per rank until ``synchronize()``, which averages
    them. With one rank the model lives in the store itself and a step is one pass of the rule's kernel.

    On several nodes each owns a share of the parameters; a step then takes the time of sending the gradient to the other
    nodes and of reading the new parameters back. Who makes MPI's operations between nodes go on while a rank computes is
    ``progress``; nothing of it runs on one node.

    With a rule whose workers have copies of their own (``easgd``) the model that a rank trains is its copy; ``synchronize()``
    replaces it by the shared centre. With a rule in turn (``gsgm``) a rank whose turn is used waits before its push.

    Args:
        params: a module, parameters, or parameter groups; groups may override the rule's hyper-parameters.
        rule: what a gradient does, see ``hpcasync.rules``.
        staleness: a rank more than this many pushes ahead of the slowest waits (stale synchronous parallel); 0 keeps
            all in step. None takes the rule's ``default_staleness``: 16 for ``apam``, whose theory needs a bound; the
            other rules have none, no rank ever waits.
        world: from ``hpcasync.init()``.
        model: whose buffers ``synchronize()`` averages, where ``params`` is not the module itself.
        on_nonfinite: ``"skip"`` the push of a gradient with NaN or infinity, or ``"abort"``.
        stall_seconds: warn every so often while waiting for slower ranks.
        progress: ``"thread"`` (a thread of each rank), ``"host-rank"`` (the ranks that ``init(host_ranks=...)`` set aside)
            or ``"library"`` (MPI needs no help); None finds out at the start and says so.

    Attributes:
        recorder: told of every meeting of this rank with the store, None for nobody.
        shard_elements: what ``make_layout`` was given.
        measure: with rule trend-smooth, whether to find out ``shrink_shares`` at the next push.
        shrink_shares: per parameter, the part of the base's step that the rule took away when it was measured last.

    Raises:
        UsageError: no trainable parameter, a parameter that is not float32, options out of range, ranks that disagree.

    Source: Dean et al., NIPS 2012 (Downpour SGD), here without a server; the bound on staleness: Ho et al., NIPS 2013 (stale
    synchronous parallel).
    """

    mode = "async"

    def __init__(
        self,
        params: Source,
        rule: Rule,
        *,
        staleness: int | None = None,
        world: World | None = None,
        model: torch.nn.Module | None = None,
        on_nonfinite: OnNonfinite = "skip",
        stall_seconds: float = 60.0,
        progress: str | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            raise UsageError(f"rule={rule!r}: expected a rule such as hpcasync.rules.TrendSmooth(lr=0.05)")
        if staleness is not None:
            between("staleness", staleness, 0, np.inf)
        groups, names, module = groups_of(params, model)
        model = module if model is None else model
        for group in groups:
            rule.check_options(rule.group_options() | group)
        super().__init__(groups, rule.group_options(), world=world, model=model, on_nonfinite=on_nonfinite)
        check_dtypes(self.params, names, [torch.float32], self.mode)
        self.rule = rule = rule.bind(self.world.size)
        self._bound = rule.default_staleness if staleness is None else int(staleness)
        self.discarded = 0
        self.recorder: Recorder | None = None
        self.measure, self.shrink_shares = False, dict[str, float]()
        self._stall_seconds = stall_seconds
        agree(
            self.world,
            {
                "the model's parameter shapes": [tuple(p.shape) for p in self.params],
                "the rule": rule.describe(),
                "staleness": self._bound,
                "on_nonfinite": on_nonfinite,
                "progress": progress,
                "the parameter groups' options": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            },
        )
        device = self.params[0].device
        self._one = self.world.size == 1
        # One rank meets nobody in a shard: long ones keep several threads busy.
        sizes, several = [p.numel() for p in self.params], self.world.nodes > 1
        size = shard_size(sizes, self.world.nodes) if several else SHARD_ELEMENTS * (16 if self._one else 1)
        layout = make_layout(sizes, size)
        self.shard_elements = size
        threads = self.world.threads
        self.progress = chosen_progress(self.world, progress)
        self.store: Store = self._make_store(layout, threads)
        self._worker = self.store.worker(self.world.rank)
        self.staleness = self._worker.staleness
        # With one rank on a CPU the model lives in the store; otherwise in this rank's own flat copy.
        aliased = self._one and not apart(device) and not rule.own_copy
        # Aligned as torch aligns its own: the bits of a product may depend on it, and a replay must find the same.
        if apart(device):
            buffer = torch.zeros(layout.total, device=device)
        else:
            buffer = torch.from_numpy(self.store.state[0] if aliased else aligned_zeros(1, layout.total)[0])
        self._staged = Staged(buffer)
        self._out = self._staged.array
        self._flat = FlatParameters(self.params, names, layout, self._staged.buffer)
        self._gradients = StagedGradients(self._flat) if self._staged.apart else None
        self._publish()
        rule.warm_up()
        self._check = FiniteCheck(self.params, threads)
        self._warned_outside = False
        self._closed = False
        self._met = self.world.size
        if not self._one:
            atexit.register(self._close_at_exit)

    def _make_store(self, layout: Layout, threads: int) -> Store:
        if self._one:
            return LocalStore(layout, self.rule, threads=threads)
        if self.progress is None:
            return WindowStore(self.world, layout, self.rule, threads=threads)
        # Nobody looks at the clocks unless there is a bound or rounds.
        clocked = self._bound is not None or self.rule.in_turn
        return RemoteStore(self.world, layout, self.rule, threads=threads, progress=self.progress, clocked=clocked)

    def step(self, closure: Closure | None = None) -> Any:
        """Push this rank's gradient and pull the newest parameters.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if any.
        """
        self.share.start()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_open()
        self._notice_changes()
        self.steps += 1
        seen = 0 if self._bound is None else self._slowest_other()
        grads = self._host_gradients()
        finite = all([g is None or self._check.finite(p, g) for p, g in zip(self._flat.params, grads, strict=True)])
        self._check.forget()
        if finite:
            self._push(grads)
        else:
            self._nonfinite(f"rank {self.world.rank}")
            self._timed(self._skip, Event.SKIP)
        if self._bound is not None and not self._one:
            self._timed(lambda: self._wait_for_slower(seen), Event.GATE)
        self._to_device()
        return loss

    def synchronize(self) -> None:
        """Wait for every rank, then give all the same newest model and averaged buffers. Collective.

        With ``easgd`` the model is then the centre, and training goes on from it; what a rank's copy had learned since its
        last exchange is dropped.

        A rank that waits here does not hold up the others' bound on staleness.
        """
        self._check_open()
        self.share.start()
        began, waited = time.perf_counter(), self.share.wait
        rank = self._worker.index
        mine = most = int(self.store.clocks[rank])
        self.store.set_clock(rank, IDLE)
        try:
            with self.share.phase("wait"):
                self._barrier()
            if self.outlived:
                self.store.forget_the_dead(self._worker, shared=self.world.rank == 0)
            most = max(self.world.gather(mine))
            self._timed(self._pull)
            self._to_device()
            self._synchronize_buffers()
            self._barrier()  # nobody pushes before all have read
        finally:
            self.store.set_clock(rank, most)
        self.store.set_excused(rank, 0)
        self._barrier()
        self._met = self.world.size
        self.share.stop()
        if self.recorder is not None:
            self.recorder.event(Event.SYNC, began, self.share.wait - waited)

    def publish(self) -> None:
        """Make rank 0's model the shared one, on all ranks, after changing it by hand. Collective."""
        self._check_open()
        self._flat.attach()
        self._barrier()
        self._publish(keep_state=True)

    def state_dict(self) -> dict[str, Any]:
        """The rule's vectors per parameter, the groups' options, and the shards' versions, copied out of the window."""
        self._check_open()
        return torch_state.pack(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, and publish rank 0's model with it. Collective.

        Vectors that a rank has for itself (easgd's momentum, gsgm's last gradient) are not saved: they start anew.

        Raises:
            UsageError: another rule's state, or another model's.
        """
        self._check_open()
        torch_state.check(self, state_dict)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._flat.attach()
        self._barrier()
        self.store.restart(self._worker)
        state = torch_state.shared(self, state_dict) if self.world.rank == 0 else None
        self.store.install(state, state_dict["hpcasync"]["versions"])
        self._pull_together()
        own = state_dict["hpcasync"]
        self.steps, self.updates, self.skipped = (own.get(k, 0) for k in ("steps", "updates", "skipped"))

    def close(self) -> None:
        """Wait for the others, pull the final model and free the window. The model stays usable. Collective."""
        if self._closed:
            return
        atexit.unregister(self._close_at_exit)
        self.synchronize()
        self._closed = True
        self._check.close()
        self._staged.wait()
        self.store.close()

    @property
    def outlived(self) -> bool:
        """Whether ranks have died since the last ``synchronize()``."""
        return self.world.size < self._met

    @property
    def closed(self) -> bool:
        """Whether this optimizer is done."""
        return self._closed

    def _close_at_exit(self) -> None:
        """Close for a script that forgot to: the others' bound on staleness must not wait for a rank that has gone."""
        if not leaving_in_error():
            self.close()

    def _host_gradients(self) -> list[np.ndarray | None]:
        if self._gradients is None:
            return [flat_grad(p, n) for p, n in zip(self._flat.params, self._flat.names, strict=True)]
        grads = self._gradients.fetch()
        # In the order of the copies; and the store may write this rank's copy of the model again.
        self.share.add("copy", self._staged.wait() + self._gradients.wait())
        return grads

    def _push(self, grads: list[np.ndarray | None]) -> None:
        if self.rule.in_turn and not self._one and not self._take_turn():
            self.discarded += 1
            self._timed(self._read, Event.DISCARD)
            return
        hypers = self._hypers()
        if self.measure:
            self.measure = False
            self.shrink_shares = shrink_shares(self.store, self._worker, grads, hypers, self.store.layout, self._flat.names)
        if self.recorder is not None:
            self.recorder.pushing(grads, hypers, int(self.store.clocks[self._worker.index]))
        self._timed(lambda: self.store.push_pull(self._worker, grads, self._out, hypers), Event.PUSH)
        self.updates += 1

    @property
    def out_of_turn(self) -> int:
        """Gradients of this rank that came out of turn (gsgm): held until their turn, or discarded."""
        return self._worker.held + self.discarded

    def _take_turn(self) -> bool:
        rule: Any = self.rule
        hold = rule.out_of_turn == "hold"
        took = False

        def work() -> None:
            nonlocal took
            took = self.store.take_turn(
                self._worker, hold=hold, patience=rule.patience, stalled=self._stalled, every=self._stall_seconds
            )

        self._timed(work, Event.TURN)
        return took

    def _read(self) -> None:
        """Read the newest parameters, unless this rank's copy is its own."""
        if not self.rule.own_copy:
            self._pull()

    def _pull(self) -> None:
        self._staged.wait()
        self.store.pull(self._worker, self._out)

    def _hypers(self) -> list[np.ndarray]:
        return [h for g in self.param_groups for h in [self.rule.hyper(g)] * len(g["params"])]

    def _skip(self) -> None:
        """Take no part in this step but read, and let the clock go on so that nobody waits for this rank."""
        self._read()
        self.store.tick(self._worker)

    def _slowest_other(self) -> int:
        """Pushes of the slowest other rank: what is read from now on has at least these of every rank."""
        if self._one:
            return IDLE
        self.store.look()
        return int(np.delete(self.store.clocks, self._worker.index).min())

    def _wait_for_slower(self, seen: int) -> None:
        """Keep the bound: wait for slower ranks, and read again unless the push has read enough of them.

        A slow rank may have pushed after this rank's read and before this rank looks at the clocks: then there is no
        wait, but the read is too old.
        """
        assert self._bound is not None
        too_old = int(self.store.clocks[self._worker.index]) - seen > self._bound
        if self.store.gate(self._worker, self._bound, self._stalled, self._stall_seconds) or too_old:
            self._read()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the optimizer is closed: its shared window is gone; make a new Async to train on")

    def _stalled(self, seconds: float, slow: list[int]) -> None:
        why = f"rule {self.rule.name}" if self.rule.in_turn else f"staleness={self._bound}"
        warnings.warn(
            f"rank {self.world.rank} has waited {seconds:.0f} s at step {self.steps} for the slower rank(s) {slow} ({why}). "
            "A rank that stops training early must call synchronize() or close().",
            RuntimeWarning,
            stacklevel=2,
        )

    def _timed(self, work: Any, kind: Event | None = None) -> None:
        """Run ``work``; its time counts as communication, less what the store spent waiting."""
        began, waited = time.perf_counter(), self._worker.waited
        with self.share.phase("communicate"):
            work()
        waited = self._worker.waited - waited
        self.share.add("wait", waited)
        self.share.add("communicate", -waited)
        if self.recorder is not None and kind is not None:
            self.recorder.event(kind, began, waited)

    def _notice_changes(self) -> None:
        """Keep parameters views of the flat buffer; warn when a change by hand is about to be lost."""
        changed = self._flat.attach() or self._flat.changed_outside()
        self._flat.mark()
        if changed and not self._one and not self._warned_outside:
            self._warned_outside = True
            warnings.warn(
                f"rank {self.world.rank}, step {self.steps}: parameters were changed outside the optimizer; the shared "
                "ones replace them now. After model.load_state_dict() and the like, call publish() on every rank.",
                RuntimeWarning,
                stacklevel=3,
            )
        if changed and self._one and self._staged.apart:
            self._publish(keep_state=True)

    def _to_device(self) -> None:
        """Begin to bring this rank's copy to the model."""
        self._staged.to_device()
        self._flat.mark()

    def _barrier(self) -> None:
        self.store.barrier()

    def _publish(self, keep_state: bool = False) -> None:
        """Write rank 0's model to the store and read it on all ranks."""
        self.store.publish(self._flat.buffer.cpu().numpy(), keep_state=keep_state)
        self._pull_together()

    def _pull_together(self) -> None:
        self._pull()
        self._to_device()
        self._barrier()
