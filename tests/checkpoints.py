"""What a checkpoint holds, for tests that compare two of them bit by bit."""

from __future__ import annotations

from pathlib import Path

import h5py


def newest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return sorted(folder.glob("checkpoint-*.h5"))[-1]


def numbers(path: Path) -> dict[str, bytes]:
    """Every array of a checkpoint but the states' texts."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return {n: v for n, v in found.items() if n != "facts" and not n.endswith("/state")}


def differences(one: Path, other: Path) -> list[str]:
    """Arrays that the newest checkpoints of two runs do not share bit by bit; empty: the same state."""
    a, b = numbers(newest(one)), numbers(newest(other))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
