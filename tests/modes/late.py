"""A device whose copies are late, played by the CPU: who reads or writes a buffer's twin too early is caught."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcasync.modes import staging

LATE = 3
"""So many times a copy says that it is not done."""


class LateCopies:
    """In place of a GPU's copies. What comes to the host is NaN there until somebody waits for it; what goes to the device must
    not be changed by the host until somebody has waited. As on a stream, copies end in the order they were begun.

    Attributes:
        begun: how many copies were made.
    """

    def __init__(self) -> None:
        self.open: list[LateCopy] = []
        self.begun = 0

    def to_host(self, host: Tensor, source: Tensor) -> LateCopy:
        self.end()
        copy = self._add(host, source.clone(), writes=True)
        host.fill_(math.nan)
        return copy

    def to_device(self, target: Tensor, host: Tensor) -> LateCopy:
        self.end()
        target.copy_(host)
        return self._add(host, host.clone(), writes=False)

    def _add(self, host: Tensor, values: Tensor, writes: bool) -> LateCopy:
        self.begun += 1
        self.open.append(LateCopy(self, host, values, writes))
        return self.open[-1]

    def end(self) -> None:
        """The device has made all copies so far."""
        for copy in self.open:
            copy.make()
        self.open.clear()


class LateCopy:
    """A copy of ``LateCopies``."""

    def __init__(self, copies: LateCopies, host: Tensor, values: Tensor, writes: bool) -> None:
        self._copies, self._host, self._values, self._writes = copies, host, values, writes
        self._asked = 0

    def make(self) -> None:
        if self._writes:
            assert bool(self._host.isnan().all()), "the host wrote to what a copy was to fill"
            self._host.copy_(self._values)
        else:
            same = torch.equal(self._host.view(torch.uint8), self._values.view(torch.uint8))
            assert same, "the host changed what was being copied to the device"

    def done(self) -> bool:
        self._asked += 1
        if self._asked > LATE:
            self._copies.end()
        return self._asked > LATE

    def wait(self) -> None:
        self._copies.end()

    def seconds(self) -> float:
        return 1.0


def late() -> LateCopies:
    """Take the CPU for such a device from now on."""
    copies = LateCopies()
    staging.copies_of = lambda device: copies  # type: ignore[assignment]
    return copies
