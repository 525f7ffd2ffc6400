"""Unpickle numbers, text, lists, dictionaries and plain arrays, and refuse everything else.

A pickle is a program: loading an unknown one may run anything. The CIFAR files are pickles, so they are read
by an unpickler whose few callables are the stand-ins below; no function of another module can be reached.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from hpcasync.errors import UsageError


class _DType:
    """Stands in for ``numpy.dtype``: keeps only the code of a plain number type and its byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def real(self) -> np.dtype[Any]:
        found = np.dtype(self.code.lstrip("<>|=")).newbyteorder(self.order)  # type: ignore[arg-type]
        if found.kind not in "uifb":
            raise ValueError(f"an array of type {found}, expected numbers")
        return found


class _Array:
    """Stands in for ``numpy.ndarray``: takes the state and makes the array from its bytes."""

    value: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = np.frombuffer(raw, dtype.real()).reshape(shape, order="F" if fortran else "C")


def _from_buffer(raw: Any, dtype: _DType, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = np.frombuffer(raw, dtype.real()).reshape(shape, order="F" if order == "F" else "C")
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {"numpy.dtype": _DType, "numpy.ndarray": _Array, "_codecs.encode": _encode}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray._reconstruct"] = _Array
    _ALLOWED[f"{_core}.numeric._frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise PermissionError(f"{module}.{name}") from None


def loads(content: bytes, where: object) -> Any:
    """The value pickled in ``content``; byte strings of Python 2 stay bytes, arrays are read-only.

    Args:
        content: the pickle.
        where: the file, for messages.

    Raises:
        UsageError: it asks for anything but plain data, or it is damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except PermissionError as error:
        raise UsageError(
            f"{where}: this pickle asks to run {error}, expected only numbers, text and arrays; nothing "
            "was run, do not trust this file"
        ) from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise UsageError(
            f"{where} is truncated, damaged or no pickle of plain data ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without content")
        return value.value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if value is None or isinstance(value, (int, float, str, bytes, bytearray)):
        return value
    raise ValueError(f"a {type(value).__name__} object")
