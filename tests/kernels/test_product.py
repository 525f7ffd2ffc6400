"""The product in registers against numpy, at shapes that reach every tile and every rest."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.kernels.product import WIDTH, product


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 5, 3), (25, WIDTH, 9), (13, 2 * WIDTH + 1, 4), (31, 9 * WIDTH + 3, 17)])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_the_product_and_writes_nothing_else(m: int, n: int, k: int, transposed: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n + 2)).astype(np.float32)
    c = np.full((m + 1, n + 3), 7, np.float32)
    left = np.ascontiguousarray(a.T) if transposed else a
    am, ak = (1, m) if transposed else (k, 1)
    product(left.ctypes.data, am, ak, b.ctypes.data, n + 2, c.ctypes.data, n + 3, m, n, k)
    np.testing.assert_allclose(c[:m, :n], a.astype(np.float64) @ b[:, :n], rtol=1e-5, atol=1e-5)
    assert (c[m:] == 7).all() and (c[:, n:] == 7).all()


def test_the_bits_do_not_depend_on_alignment() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 50)).astype(np.float32), rng.standard_normal((50, 70)).astype(np.float32)
    found = []
    for shift in range(3):
        moved = np.empty(b.size + shift, np.float32)[shift:].reshape(b.shape)
        moved[:] = b
        c = np.empty((9, 70), np.float32)
        product(a.ctypes.data, 50, 1, moved.ctypes.data, 70, c.ctypes.data, 70, 9, 70, 50)
        found.append(c.view(np.int32))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
