"""Staging: a flat buffer on a GPU, its twin in pinned host memory, and copies between them on a stream of their own."""

from __future__ import annotations

import functools
import time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hpcasync.modes.flat import FlatParameters, check_dense


class Copy(Protocol):
    """A copy that has begun."""

    def done(self) -> bool:
        """Whether it is complete."""

    def wait(self) -> None:
        """Hold the host until it is complete."""

    def seconds(self) -> float:
        """How long it took on the device, once complete."""


class Copies(Protocol):
    """What moves buffers between a device and the host; the copies of one object are made in the order they were begun."""

    def to_host(self, host: Tensor, source: Tensor) -> Copy:
        """Begin to copy what the device's work so far leaves in ``source``."""

    def to_device(self, target: Tensor, host: Tensor) -> Copy:
        """Begin to copy to ``target``, after the device's work so far; its work from now on finds the new values."""


class _CudaCopy:
    def __init__(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        self._began, self.ended = began, ended

    def done(self) -> bool:
        return self.ended.query()

    def wait(self) -> None:
        self.ended.synchronize()

    def seconds(self) -> float:
        return self._began.elapsed_time(self.ended) / 1000


class _CudaCopies:
    """Copies on a stream beside the one that computes; events order the two, the host waits for neither.

    The buffers live as long as their `Staged`, and the computing stream waits for every copy to the device: so no memory is
    given out again under a copy, and ``record_stream`` is not needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def to_host(self, host: Tensor, source: Tensor) -> _CudaCopy:
        return self._begin(host, source)

    def to_device(self, target: Tensor, host: Tensor) -> _CudaCopy:
        copy = self._begin(target, host)
        torch.cuda.current_stream(self._device).wait_event(copy.ended)
        return copy

    def _begin(self, target: Tensor, source: Tensor) -> _CudaCopy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            began.record(self.stream)
            target.copy_(source, non_blocking=True)
            ended.record(self.stream)
        return _CudaCopy(began, ended)


@functools.cache
def copies_of(device: torch.device) -> Copies | None:
    """What copies between a device and the host; None for the CPU, whose memory is the host's."""
    return _CudaCopies(device) if device.type == "cuda" else None


def apart(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return copies_of(device) is not None


def on_host(memory: Tensor) -> bool:
    """Whether a backend of collectives sums ``memory`` on the host."""
    return memory.device.type == "cpu"


class Staged:
    """A flat buffer where the model is, and its twin in host memory.

    On a CPU both are one memory: nothing is copied and nothing waits. For a GPU the twin is pinned. The host must leave the
    twin alone from ``to_host`` until ``wait``, and must not write it from ``to_device`` until ``wait``; the device may go on.

    Args:
        buffer: 1-D.
        host: the twin, of the same size and dtype; None makes one.

    Attributes:
        buffer: as given.
        host: the twin; ``array`` is the same as a numpy array.
        apart: whether the two are different memory.
    """

    def __init__(self, buffer: Tensor, host: Tensor | None = None) -> None:
        self._copies = copies_of(buffer.device)
        self.apart = self._copies is not None
        self.buffer = buffer
        if self._copies is None:
            host = buffer
        elif host is None:
            host = torch.zeros(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.device.type == "cuda")
        self.host: Tensor = host if host is not None else buffer
        self.array: np.ndarray = self.host.numpy()
        self._begun: list[Copy] = []

    @classmethod
    def beside(cls, host: Tensor, device: torch.device) -> Staged:
        """For memory of the host (as ``Collectives.buffers`` gives it) a buffer on ``device`` with the same values."""
        return cls(host.to(device, copy=True), host) if apart(device) else cls(host)

    def to_host(self) -> None:
        """Begin to bring the buffer's values to the twin."""
        if self._copies is not None:
            self._begun.append(self._copies.to_host(self.host, self.buffer))

    def to_device(self) -> None:
        """Begin to bring the twin's values to the buffer; what the device is given to do from now on finds them."""
        if self._copies is not None:
            self._begun.append(self._copies.to_device(self.buffer, self.host))

    def arrived(self) -> bool:
        """Whether no copy is under way."""
        return not self._begun or self._begun[-1].done()

    def wait(self) -> float:
        """Hold the host until no copy is under way.

        Returns:
            Seconds that it was held for copying: at most what the copies took on the device. What it was held longer, the
            device was computing what was to be copied.
        """
        if not self._begun:
            return 0.0
        began = time.perf_counter()
        self._begun[-1].wait()
        held = time.perf_counter() - began
        copied = sum(copy.seconds() for copy in self._begun)
        self._begun.clear()
        return min(held, copied)


class StagedGradients:
    """The gradients of flat parameters: gathered in one buffer where they are, brought to the host in one copy.

    They are taken as they are at the step, not as backward made them: a script may clip them in between.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat
        self.staged = Staged(torch.zeros_like(flat.buffer))
        self._views = [self.staged.buffer[start : start + size].view(p.shape) for _, p, start, size in flat.places()]

    @torch.no_grad()
    def fetch(self) -> list[np.ndarray | None]:
        """Begin to fetch them: per parameter float32 (size,), None without a gradient, to be read after ``wait``.

        Raises:
            UsageError: a sparse gradient.
        """
        places: list[Tensor] = []
        grads: list[Tensor] = []
        for (name, p, _, _), view in zip(self._flat.places(), self._views, strict=True):
            if p.grad is not None:
                grads.append(check_dense(p.grad, name))
                places.append(view)
        if grads:
            torch._foreach_copy_(places, grads)
            self.staged.to_host()
        array = self.staged.array
        return [None if p.grad is None else array[start : start + size] for _, p, start, size in self._flat.places()]

    def wait(self) -> float:
        """As `Staged.wait`."""
        return self.staged.wait()
