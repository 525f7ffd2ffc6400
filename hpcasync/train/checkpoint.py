"""Checkpoints: the state of a mode on all ranks, of generators of random numbers, and of whatever else has a ``state_dict``."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.modes import Hierarchical, Mode, state
from hpcasync.modes.wrapper import Wrapper
from hpcasync.train.checkpoint_ranks import Reading, read_ranks, write_ranks


class Stateful(Protocol):
    """Anything that can be saved beside the mode: a scheduler, a loader, a `Guided`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def save_checkpoint(
    path: str | os.PathLike[str],
    mode: Mode,
    *,
    extra: Any = None,
    facts: Mapping[str, Any] | None = None,
    **parts: Stateful,
) -> None:
    """Write a checkpoint of all ranks into one file. Collective; between steps, without gradients under way.

    It holds the parameters, the model's buffers, all of the mode's state (``hpcasync.modes.state``), and every rank's
    generators of torch, numpy and Python. The file appears under its name only when it is whole and synced.
    In mode async the ranks meet here, each at its own step.

    Args:
        path: of the file; only rank 0 writes.
        mode: an `Async`, a `Sync`, a `KStep` or a `Hierarchical`.
        extra: anything of tensors, arrays, numbers, texts, dicts, lists and tuples; each rank's own.
        facts: small and plain, of rank 0; anyone can read them without a model (``checkpoint_facts``).
        parts: by name what else has a state, such as ``loader=batches, schedule=scheduler``; each rank's own.

    Raises:
        UsageError: the same on every rank: no space, no permission, or a state that can't be stored. What was at
            ``path`` stays.
    """
    with mode.everyone.phase("a checkpoint"), state.idle(mode) as clock:
        mode.everyone.collectives.barrier()
        if isinstance(mode, Hierarchical):
            mode.settle()
        shared = state.shared_state(mode)
        states = {name: part.state_dict() for name, part in parts.items()}
        own = _own(mode, state.rank_state(mode, clock), states, extra)
        write_ranks(Path(path), mode.everyone, _about(mode, facts), shared, own)


def save_alone(
    path: str | os.PathLike[str], mode: Wrapper, states: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint of this rank's state alone: of a job that has stalled. Not collective.

    The thread that trains is held in an operation of the mode. ``load_checkpoint`` gives all ranks this state, but for the
    generators of random numbers; see ``modes.state.alone_state`` for what the model is.

    Args:
        path: of the file.
        mode: a `Sync` or a `KStep`.
        states: by name, of what is saved beside the mode.
        facts: as for ``save_checkpoint``.

    Raises:
        UsageError: no space, no permission, or a state that can't be stored.
    """
    shared, own = state.alone_state(mode)
    alone = {"rank": mode.everyone.rank, "of": mode.everyone.size}
    write_ranks(Path(path), World(), _about(mode, facts) | {"alone": alone}, shared, _own(mode, own, states, None))


def _about(mode: Mode, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(facts or {}), "identity": state.identity(mode), "model": state.shapes(mode)}


def _own(mode: Mode, own: dict[str, Any], states: Mapping[str, Any], extra: Any) -> dict[str, Any]:
    return {"mode": own, "parts": dict(states), "random": _random_state(mode), "extra": extra}


def load_checkpoint(path: str | os.PathLike[str], mode: Mode, **parts: Stateful) -> Any:
    """Restore what ``save_checkpoint`` wrote. Collective.

    On another number of ranks, rank ``r`` takes what rank ``r % ranks`` of the checkpoint had; what makes no sense then
    is reset, see ``Restored.reset``.

    Args:
        path: of the file; only rank 0 reads.
        mode: as the one that was saved: the same mode, rule and model.
        parts: as for ``save_checkpoint``.

    Returns:
        A `Restored`: ``extra``, ``facts``, and ``reset``.

    Raises:
        UsageError: the same on every rank: not there, damaged, of a newer format, of another mode, rule or model; nothing
            has been changed then.
    """
    with read_ranks(Path(path), mode.everyone) as source:
        return restore(source, mode, parts)


class Restored:
    """What a checkpoint gave beside the states it restored.

    Attributes:
        extra: what this rank's ``save_checkpoint`` was given (of rank ``r % ranks`` on another number of ranks).
        facts: those of the checkpoint.
        reset: what was not restored, for the number of ranks is another, or other nodes have other shards; empty if all was.
    """

    def __init__(self, extra: Any, facts: dict[str, Any], reset: tuple[str, ...]) -> None:
        self.extra, self.facts, self.reset = extra, facts, reset


def restore(source: Reading, mode: Mode, parts: Mapping[str, Stateful]) -> Restored:
    """Restore from an open checkpoint. Collective. See ``load_checkpoint``."""
    check_model(source, mode)
    same = source.same(mode.everyone.size)
    shared, own = source.shared(), source.own()
    missing = sorted(parts.keys() - own["parts"].keys())
    if missing:
        raise UsageError(f"checkpoint {source.path} holds no {', '.join(missing)}; it holds {', '.join(own['parts']) or 'none'}")
    reset = state.restore(mode, shared, own["mode"], same=same, mean=source.mean)
    for name, part in parts.items():
        saved = own["parts"][name]
        if source.alone is not None:
            saved = _of_this_rank(saved, part)
        part.load_state_dict(saved if same else _elsewhere(saved))
    if same and source.alone is None:
        _set_random_state(own["random"])
    else:
        reset = (*reset, "generators of random numbers")
    if source.alone is not None:
        reset = (*reset, f"what each rank had for itself: all go on with what rank {source.alone} had")
    return Restored(own["extra"], source.facts, reset)


def check_model(source: Reading, mode: Mode) -> None:
    """Refuse the checkpoint of another mode, rule, optimizer or model.

    Raises:
        UsageError: naming what differs, of the model the tensors.
    """
    saved, here = source.facts["identity"], state.identity(mode)
    for key in dict.fromkeys([*saved, *here]):
        if saved.get(key) != here.get(key):
            raise UsageError(f"checkpoint {source.path} is of {key} {saved.get(key)!r}, this is {key} {here.get(key)!r}")
    theirs = {name: (tuple(shape), dtype) for name, shape, dtype in source.facts["model"]}
    mine = {name: (tuple(shape), dtype) for name, shape, dtype in state.shapes(mode)}
    if theirs == mine:
        return
    differ = [
        f"{name} is {_shape(theirs.get(name))} in the checkpoint, {_shape(mine.get(name))} here"
        for name in dict.fromkeys([*theirs, *mine])
        if theirs.get(name) != mine.get(name)
    ] or ["the same tensors in another order"]
    more = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
    raise UsageError(f"checkpoint {source.path} is of another model: {'; '.join(differ[:8])}{more}")


def _shape(found: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if found is None else f"{found[1]} {found[0]}"


def _elsewhere(saved: Any) -> Any:
    """A part's state for another number of ranks: a loader can't go on inside an epoch."""
    return saved | {"batch": 0} if isinstance(saved, dict) and "batch_size" in saved else saved


def _of_this_rank(saved: Any, part: Stateful) -> Any:
    """Another rank's state of a loader as this rank's: its own part of the data."""
    own = part.state_dict().get("part") if isinstance(saved, dict) and "batch_size" in saved else None
    return saved if own is None else saved | {"part": own}


def _random_state(mode: Mode) -> dict[str, Any]:
    device = mode.everyone.device
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(), **cuda}


def _set_random_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    np.random.set_state(saved["numpy"])
    random.setstate(saved["python"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
