"""Page-locked rows of the window: given back once, before they are unmapped; a refusal is one clear error.

CUDA is played here, since there is no GPU; `tests/comm/test_backends_gpu.py` uses the real one.
"""

from __future__ import annotations

import gc
import mmap

import numpy as np
import pytest
import torch

from hpcasync.comm.collectives.gpu import page_lock
from hpcasync.errors import UsageError


class Cuda:
    """Remembers what is locked."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.locked, self.freed = code, dict[int, int](), list[int]()

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self.locked[start] = size
        return self.code

    def cudaHostUnregister(self, start: int) -> int:
        self.freed.append(start)
        return 0


def test_unlocked_when_the_last_array_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    rows = np.frombuffer(mmap.mmap(-1, 3 * 4096), np.uint8).reshape(3, 4096)
    start = rows[1].ctypes.data
    page_lock(rows[1])
    assert cuda.locked == {start: 4096}
    kept = torch.from_numpy(rows[1])[64:128].view(torch.float32)
    kept[0] = 1
    del rows
    gc.collect()
    assert kept[0] == 1 and not cuda.freed
    del kept
    gc.collect()
    assert cuda.freed == [start]


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cuda(code=2))
    with pytest.raises(UsageError, match=r"cudaError 2.*ulimit -l.*--collectives mpi"):
        page_lock(np.zeros(10))
