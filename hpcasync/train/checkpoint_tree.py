"""Nested states (of optimizers, schedulers, generators) as plain JSON and named arrays, and back, without pickle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcasync.errors import UsageError

Arrays = dict[str, np.ndarray]


def pack(tree: Any, prefix: str = "") -> tuple[Any, Arrays]:
    """Part a tree into JSON and arrays.

    Args:
        tree: dicts, lists, tuples, numbers, texts, None, tensors and arrays, nested.
        prefix: put before every array's name.

    Returns:
        What ``json`` can write, and the arrays by name (a path of keys), contiguous, on the host, without a copy where
        possible.

    Raises:
        UsageError: something else in the tree.
    """
    arrays: Arrays = {}
    return _pack(tree, prefix, arrays), arrays


def unpack(plain: Any, array: Callable[[str], np.ndarray]) -> Any:
    """The tree that ``pack`` was given; ``array`` finds the arrays by their names, each is asked for once."""
    if isinstance(plain, list):
        return [unpack(v, array) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        found = torch.from_numpy(array(plain["$tensor"]))
        return found.view(getattr(torch, plain["dtype"])) if "dtype" in plain else found
    if "$array" in plain:
        return array(plain["$array"])
    if "$tuple" in plain:
        return tuple(unpack(v, array) for v in plain["$tuple"])
    if "$items" in plain:
        return {unpack(k, array): unpack(v, array) for k, v in plain["$items"]}
    return {k: unpack(v, array) for k, v in plain.items()}


def _pack(value: Any, path: str, arrays: Arrays) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        host = value.detach().to("cpu").contiguous()
        if host.dtype == torch.bfloat16:  # numpy has none
            return {"$tensor": _name(path, host.view(torch.int16).numpy(), arrays), "dtype": "bfloat16"}
        return {"$tensor": _name(path, host.numpy(), arrays)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"$array": _name(path, np.ascontiguousarray(value).reshape(value.shape), arrays)}
    if isinstance(value, dict):
        items = [(k, _pack(v, _join(path, k), arrays)) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(items)
        return {"$items": [[_pack(k, path, arrays), v] for k, v in items]}
    if isinstance(value, (list, tuple)):
        parts = [_pack(v, _join(path, i), arrays) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise UsageError(
        f"a checkpoint can't hold {path or 'the state'}: found {type(value).__name__}, expected tensors, arrays, numbers, "
        "texts, and dicts, lists and tuples of them"
    )


def _name(path: str, array: np.ndarray, arrays: Arrays) -> str:
    name = path or "value"
    while name in arrays:
        name += "~"
    arrays[name] = array
    return name


def _join(path: str, key: Any) -> str:
    """``path/key``, with what HDF5 would take for a step in the path made harmless."""
    text = str(key).replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    text = "%2E" * len(text) if text in ("", ".", "..") and text else text or "%"
    return f"{path}/{text}" if path else text
