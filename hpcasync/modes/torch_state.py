"""``state_dict`` of mode async in torch's form: the rule's vectors per parameter, from the store and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpcasync.errors import UsageError

if TYPE_CHECKING:
    from hpcasync.modes.asynchronous import Async


def pack(mode: Async, packed: dict[str, Any]) -> dict[str, Any]:
    """Add the rule's vectors, the counts and the shards' versions to ``packed``, what torch packs of ``mode``."""
    layout, state = mode.store.layout, mode.store.snapshot(mode._worker)
    packed["state"] = {
        i: {
            v.name: torch.from_numpy(state[row, start : start + size].copy()).view(mode._flat.params[i].shape)
            for row, v in enumerate(mode.rule.vectors, start=1)
            if v.saved
        }
        for i, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True))
    }
    counts = {"steps": mode.steps, "updates": mode.updates, "skipped": mode.skipped}
    packed["hpcasync"] = {"rule": mode.rule.describe(), "versions": mode.store.shard_versions(), **counts}
    return packed


def check(mode: Async, state_dict: dict[str, Any]) -> None:
    """Refuse what ``mode`` can't load.

    Raises:
        UsageError: another rule's state, or another model's.
    """
    theirs = state_dict.get("hpcasync", {}).get("rule", {})
    mine = mode.rule.describe()
    structure = ("name", "base", "variant")
    if [theirs.get(k) for k in structure] != [mine.get(k) for k in structure]:
        raise UsageError(f"the state is of rule {theirs or 'unknown'}, this optimizer has {mine}")
    shapes = [tuple(p.shape) for p in mode._flat.params]
    for i, shape in enumerate(shapes):
        vectors: dict[str, torch.Tensor] = state_dict["state"].get(i, {})
        for v in [v for v in mode.rule.vectors if v.saved]:
            found = tuple(vectors[v.name].shape) if v.name in vectors else "nothing"
            if found != shape:
                raise UsageError(f"state of {mode._flat.names[i]}, {v.name}: found {found}, expected {shape}")


def shared(mode: Async, state_dict: dict[str, Any]) -> np.ndarray:
    """The model and the rule's vectors as the store has them: float32 (1 + vectors, layout.total)."""
    layout, vectors = mode.store.layout, mode.rule.vectors
    state = np.zeros((1 + len(vectors), layout.total), np.float32)
    state[0] = mode._flat.buffer.cpu().numpy()
    for row, v in enumerate(vectors, start=1):
        state[row] = v.start
        for i, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True) if v.saved else ()):
            state[row, start : start + size] = state_dict["state"][i][v.name].reshape(-1).numpy()
    return state
