"""The whole state of a mode, for checkpoints: what is shared, what is of each rank, and how both come back.

``state_dict`` of a mode is torch's: what an optimizer adds to a model on one rank. This is more: the parameters themselves,
every rank's own, versions, clocks, the vectors that workers have for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcasync.modes.asynchronous import Async
from hpcasync.modes.base import Mode
from hpcasync.modes.hierarchical import Hierarchical
from hpcasync.modes.kstep import KStep
from hpcasync.modes.wrapper import Wrapper
from hpcasync.store import IDLE

_STRUCTURE = ("base", "variant", "adaptive", "average", "window")
"""Options of a rule that decide which vectors it has."""

Mean = Callable[[str], dict[str, np.ndarray]]


def named_parameters(mode: Mode) -> dict[str, Tensor]:
    """The parameters that ``mode`` trains, by name, in its order."""
    names = mode._flat.names if isinstance(mode, Async) else mode.names if isinstance(mode, Wrapper) else []
    return dict(zip(names, mode.params, strict=True))


def other_tensors(mode: Mode) -> dict[str, Tensor]:
    """The tensors of the model that ``mode`` does not train: its buffers, and parameters it was not given."""
    model = mode._model
    trained = {id(p) for p in mode.params}
    return {} if model is None else {
        name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if id(t) not in trained
    }  # fmt: skip


def shapes(mode: Mode) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor of the model."""
    tensors = [*named_parameters(mode).items(), *other_tensors(mode).items()]
    return [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors]


def identity(mode: Mode) -> dict[str, Any]:
    """What the state of another mode must have in common with that of ``mode``, small and plain."""
    facts: dict[str, Any] = {"mode": mode.mode}
    if isinstance(mode, Async):
        described = mode.rule.describe()
        return facts | {key: described[key] for key in _STRUCTURE if key in described} | {"rule": described["name"]}
    return facts | ({"optimizer": type(mode.inner).__name__} if isinstance(mode, Wrapper) else {})


@contextmanager
def idle(mode: Mode) -> Iterator[int]:
    """Inside, nobody waits for this rank: neither for a bound on staleness nor for its turn. Yields the rank's clock."""
    if not isinstance(mode, Async) or mode.closed:
        yield 0
        return
    rank = mode._worker.index
    clock = int(mode.store.clocks[rank])
    mode.store.set_clock(rank, IDLE)
    try:
        yield clock
    finally:
        mode.store.set_clock(rank, clock)


def shared_state(mode: Mode) -> dict[str, Any]:
    """What the ranks share, on rank 0; nothing on the others. No rank may push meanwhile.

    Under ``model`` lies the model as it would be if the training ended now, but for an average that is due.
    """
    rest = {name: t.detach() for name, t in other_tensors(mode).items()}
    if not isinstance(mode, Async):
        return {"model": {n: p.detach() for n, p in named_parameters(mode).items()} | rest} if mode.world.rank == 0 else {}
    if isinstance(mode, Hierarchical):
        if mode.everyone.rank:
            return {}
        found = _group_state(mode)
        return {"model": found["model"] | rest, "block": mode.block_state(), "groups": mode.groups}
    versions, state = mode.store.shard_versions(), mode.store.snapshot(mode._worker)
    if mode.world.rank:
        return {}
    found = _rule_state(mode, state, versions)
    return found | {"model": found["model"] | rest}


def _rule_state(mode: Async, state: np.ndarray, versions: list[int]) -> dict[str, Any]:
    rows = [_by_name(mode, row) for row in state]
    return {
        "model": rows[0],
        "vectors": {v.name: row for v, row in zip(mode.rule.vectors, rows[1:], strict=True)},
        "versions": np.array(versions, np.int64),
        "notes": mode.store.shard_notes(),
    }


def _group_state(mode: Hierarchical) -> dict[str, Any]:
    """What the ranks of a group share, as it lies in their memory: nobody pushes. A checkpoint stores equal arrays once."""
    return _rule_state(mode, mode.store.state, mode.store.shard_versions())


def rank_state(mode: Mode, clock: int) -> dict[str, Any]:
    """What this rank has for itself; ``clock`` is what ``idle`` gave, for the rank is idle now."""
    own: dict[str, Any] = {"rest": {name: t.detach() for name, t in other_tensors(mode).items()}}
    if isinstance(mode, Wrapper):
        return own | {"parameters": {n: p.detach() for n, p in named_parameters(mode).items()}, "optimizer": mode.state_dict()}
    assert isinstance(mode, Async)
    worker, private = mode._worker, mode.store.own_vectors(mode._worker)
    if isinstance(mode, Hierarchical):
        own |= {"group": _group_state(mode), "since": mode._since, "averages": mode.averages}
    return own | {
        "copy": _by_name(mode, mode._out) if mode.rule.own_copy else {},
        "private": {v.name: _by_name(mode, row) for v, row in zip(mode.rule.private_vectors, private, strict=True)},
        "read": worker.read,
        "pushed": worker.pushed,
        "pushes": worker.steps,
        "clock": clock,
        "excused": int(mode.store.excused[mode._worker.index]),
        "counts": {n: getattr(mode, n) for n in ("steps", "updates", "skipped", "discarded")},
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in mode.param_groups],
    }


def alone_state(mode: Wrapper) -> tuple[dict[str, Any], dict[str, Any]]:
    """``shared_state`` and ``rank_state`` by this rank alone, whose thread is held in an operation of the mode.

    In mode sync the model is that before the step under way, the same on all ranks. In mode kstep it is this rank's own,
    within its block; while models are being summed in place it is the one after the last average.
    """
    own = rank_state(mode, 0)
    if isinstance(mode, KStep) and mode.averaging:
        own["parameters"] = mode.agreed()
        own["optimizer"]["hpcasync"]["since"] = 0
    return {"model": own["parameters"] | own["rest"]}, own


def restore(mode: Mode, shared: Any, own: Any, *, same: bool, mean: Mean) -> tuple[str, ...]:
    """Bring both states back. Collective.

    Args:
        mode: like the one they are of.
        shared: of ``shared_state``, on rank 0.
        own: of ``rank_state``; that of some rank where there were other ranks.
        same: whether there are as many ranks as there were.
        mean: gives the mean over the old ranks of what lies under a path of their state.

    Returns:
        What was reset, since it means nothing on another number of ranks, or with other shards.
    """
    with torch.no_grad():
        for name, tensor in other_tensors(mode).items():
            tensor.copy_(own["rest"][name])
    if isinstance(mode, Hierarchical):
        return _restore_groups(mode, shared, own, same, mean)
    if isinstance(mode, Async):
        return _restore_async(mode, shared, own, same)
    assert isinstance(mode, Wrapper)
    mode.load_state_dict(own["optimizer"])
    reset: tuple[str, ...] = ()
    values = own["parameters"]
    if isinstance(mode, KStep) and not same and mode._since:
        # As at an average, but without a step of the block momentum: the block goes on from there.
        values = {name: torch.from_numpy(v) for name, v in mean("mode/parameters").items()}
        reset = ("the ranks' models inside a block of local steps: all go on from their mean",)
        mode._since = 0
    with torch.no_grad():
        for name, p in named_parameters(mode).items():
            p.copy_(values[name])
    return reset


def _restore_groups(mode: Hierarchical, shared: Any, own: Any, same: bool, mean: Mean) -> tuple[str, ...]:
    """Each group's own state; on other ranks or groups all go on from the groups' mean, inside the same block momentum."""
    same = same and mode.everyone.gather(shared["groups"] if mode.everyone.rank == 0 else None)[0] == mode.groups
    group, since = own["group"], own["since"]
    reset: tuple[str, ...] = ()
    if not same:
        if mode.everyone.gather(since)[0]:
            reset = ("the groups' models inside a block of steps: all go on from their mean",)
        group = group | {"model": mean("mode/group/model")}
        since = 0
        if mode.rule.vectors:
            reset += (f"{', '.join(v.name for v in mode.rule.vectors)} of rule {mode.rule.name}: of one of the groups before",)
    reset += _restore_async(mode, group if mode.world.rank == 0 else None, own, same)
    mode.load_block(shared["block"] if mode.everyone.rank == 0 else None, since, own["averages"])
    return reset


def _restore_async(mode: Async, shared: Any, own: Any, same: bool) -> tuple[str, ...]:
    rule, store, rank = mode.rule, mode.store, mode.world.rank
    for group, saved in zip(mode.param_groups, own["groups"], strict=True):
        group.update(saved)
    mode._flat.attach()
    store.barrier()
    store.restart(mode._worker)
    private, worker = rule.private_vectors, mode._worker
    alike = len(own["pushed"]) == len(worker.pushed)  # on other nodes the same model has other shards
    # The vectors of a rule without own copies go with the shards' notes.
    complete = same and len(own["private"]) == len(private) and (alike or not private or rule.own_copy)
    complete = all(mode.world.gather(complete))
    state = versions = notes = None
    if rank == 0:
        # Shared vectors that mean nothing without the workers' own start anew with them.
        keep = {v.name for v in rule.vectors if v.saved or complete}
        state = np.zeros((1 + len(rule.vectors), store.layout.total), np.float32)
        _fill(mode, state[0], shared["model"])
        for row, v in enumerate(rule.vectors, start=1):
            state[row] = v.start
            if v.name in keep:
                _fill(mode, state[row], shared["vectors"][v.name])
        versions = shared["versions"].tolist()
        notes = shared["notes"] if complete and len(shared["notes"]) == len(store.layout.shards) else None
    versions, notes = mode.world.gather((versions, notes))[0]
    store.install(state, versions, notes)
    if complete and private:
        values = np.zeros((len(private), store.layout.total), np.float32)
        for values_of, v in zip(values, private, strict=True):
            _fill(mode, values_of, own["private"][v.name])
        store.set_own_vectors(worker, values)
    if complete:
        worker.pushed[:] = own["pushed"] if alike else own["pushed"].all()
    if same:
        worker.steps = own["pushes"]
        store.set_clock(worker.index, own["clock"])
        store.set_excused(worker.index, own["excused"])
    store.barrier()
    mode._staged.wait()
    if not (same and rule.own_copy and alike):
        store.pull(worker, mode._out)
    if same and rule.own_copy:
        if alike:
            worker.read[:] = own["read"]
        _fill(mode, mode._out, own["copy"])
    mode._to_device()
    store.barrier()
    for name, count in own["counts"].items():
        setattr(mode, name, count)
    gone = [] if complete else [v.name for v in private]
    gone += ["the workers' copies"] if rule.own_copy and not same else []
    return (f"{', '.join(gone)} of rule {rule.name}",) if gone else ()


def _by_name(mode: Async, row: np.ndarray) -> dict[str, np.ndarray]:
    """Views of a row of the flat state, one per parameter."""
    layout = mode.store.layout
    places = zip(mode._flat.names, mode._flat.params, layout.starts, layout.sizes, strict=True)
    return {name: row[start : start + size].reshape(p.shape) for name, p, start, size in places}


def _fill(mode: Async, row: np.ndarray, values: dict[str, Any]) -> None:
    for name, part in _by_name(mode, row).items():
        part[...] = np.asarray(values[name])


