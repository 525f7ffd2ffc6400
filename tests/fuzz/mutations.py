"""How a good file is spoilt: bytes changed, cut, moved and invented; in HDF5 also the contents, behind right checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import strategies as st

_PLACE = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
_EXTREME = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1])
_EDIT = st.one_of(
    st.tuples(st.just("set"), _PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), _PLACE, st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("number"), _PLACE, st.tuples(_EXTREME, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["little", "big"]))),
    st.tuples(st.just("cut"), _PLACE, st.just(None)),
    st.tuples(st.just("remove"), _PLACE, st.integers(1, 64)),
    st.tuples(st.just("repeat"), _PLACE, st.integers(1, 4096)),
)
# Half of the edits fall into the first bytes, where a format keeps what it says about itself.
BYTES = st.tuples(st.sampled_from([1.0, 0.05]), st.lists(_EDIT, min_size=1, max_size=6))
WHOLE = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))

_KINDS = ["attribute", "array", "remove", "group", "link"]
_VALUES: list[Any] = [
    np.float64("nan"), np.float64("inf"), -1, 0, 2**40, "", "text", b"\xff\xfe", np.array([], np.float32), np.zeros((3, 0)),
    np.array(["a", "b"], dtype="S3"), np.array([[1, 2], [3, 4]]), np.full(7, np.nan), np.zeros(5, "complex64"), np.uint8(7),
    np.zeros(2, [("a", "i4"), ("b", "f8")]), h5py.Empty("f4"), np.arange(10.0), np.full(3, -5), np.full(4, 10**12),
]  # fmt: skip
CONTENTS = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 10**6), st.sampled_from(_VALUES)),
    min_size=1,
    max_size=3,
)


def spoil(content: bytes, how: tuple[float, list[tuple[str, float, Any]]]) -> bytes:
    """``content`` after the edits that ``BYTES`` drew."""
    within, edits = how
    for kind, place, value in edits:
        at = int(place * within * len(content))
        if kind == "set":
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        elif kind == "number":
            number, size, order = value
            content = content[:at] + (number % 256**size).to_bytes(size, order) + content[at + size :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "remove":
            content = content[:at] + content[at + value :]
        else:
            content = content[: at + value] + content[at:]
    return content


def spoil_contents(path: Path, how: list[tuple[str, int, Any]]) -> None:
    """Change attributes and arrays of the HDF5 file ``path`` as ``CONTENTS`` drew; it stays good HDF5."""
    for kind, which, value in how:
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            if kind == "attribute" and len(file.attrs):
                key = sorted(file.attrs)[which % len(file.attrs)]
                file.attrs[key] = value
                continue
            if not names:
                continue
            name = names[which % len(names)]
            del file[name]
            if kind == "array":
                file[name] = value
            elif kind == "group":
                file.create_group(name)
            elif kind == "link":
                file[name] = h5py.ExternalLink("/etc/passwd", "/") if which % 2 else h5py.SoftLink(f"/{name}")
