"""A matrix product on one thread, in registers: for small matrices that no other thread shares.

The processor's vectors are written out as LLVM vectors, so that the widest are used whoever made the processor: for a layer
of 784 to 128 and a batch of 32 it takes half to a third of the time of MKL or OpenBLAS on an AMD processor with AVX-512. The
order of additions, so the bits, depends on the shapes alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

_FLOAT, _INT64 = ir.FloatType(), ir.IntType(64)
_FEATURES = binding.get_host_cpu_features()
_AVX512 = bool(_FEATURES.get("avx512f"))
WIDTH = 16 if _AVX512 else 8 if _FEATURES.get("avx2") else 4
"""Floats in a vector register."""


def _tile(rows: int, vectors: int, width: int = WIDTH) -> Any:
    """An intrinsic that computes ``rows`` x ``vectors * width`` elements of the product, all held in registers.

    Called with the addresses of the first elements of a, b and c and their strides in elements, as ``product``.
    """
    vector = ir.VectorType(_FLOAT, width)

    def index(value: int) -> Any:
        return ir.Constant(_INT64, value)

    @intrinsic
    def tile(context: Any, a: Any, am: Any, ak: Any, b: Any, bk: Any, c: Any, cm: Any, k: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, am, ak, b, bk, c, cm, k = args
            name = f"llvm.fma.v{width}f32"
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            pa, pb, pc = (builder.inttoptr(address, _FLOAT.as_pointer()) for address in (a, b, c))
            undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            before, loop, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("after")
            builder.branch(loop)  # k is at least 1
            builder.position_at_end(loop)
            step = builder.phi(_INT64)
            sums = [builder.phi(vector) for _ in range(rows * vectors)]
            left, right = builder.gep(pa, [builder.mul(step, ak)]), builder.gep(pb, [builder.mul(step, bk)])
            across = [
                builder.load(builder.bitcast(builder.gep(right, [index(width * j)]), vector.as_pointer()), align=4)
                for j in range(vectors)
            ]
            new = []
            for i in range(rows):
                one = builder.load(builder.gep(left, [builder.mul(am, index(i))]))
                first = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
                spread = builder.shuffle_vector(first, undefined, zeros)
                new += [builder.call(fma, [spread, across[j], sums[i * vectors + j]]) for j in range(vectors)]
            following = builder.add(step, index(1))
            step.add_incoming(index(0), before)
            step.add_incoming(following, loop)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(ir.Constant(vector, [0.0] * width), before)
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, k), loop, after)
            builder.position_at_end(after)
            for i in range(rows):
                row = builder.gep(pc, [builder.mul(cm, index(i))])
                for j in range(vectors):
                    target = builder.bitcast(builder.gep(row, [index(width * j)]), vector.as_pointer())
                    builder.store(new[i * vectors + j], target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), build

    return tile


# As many sums as leave registers for the factors: 32 registers with AVX-512, 16 before.
_WIDE, _WIDE_ROWS = (4, 6) if _AVX512 else (2, 6)
_HALF_ROWS, _ONE_ROWS = (12, 24) if _AVX512 else (6, 12)
_wide, _wide_one = _tile(_WIDE_ROWS, _WIDE), _tile(1, _WIDE)
_half, _half_one = _tile(_HALF_ROWS, 2), _tile(1, 2)
_one, _one_one = _tile(_ONE_ROWS, 1), _tile(1, 1)
_rest, _rest_one = _tile(8, 1, 1), _tile(1, 1, 1)


@njit(cache=True, nogil=True, error_model="numpy")
def product(a, am, ak, b, bk, c, cm, m, n, k):
    """``c[i, j] = sum over l < k of a[i, l] b[l, j]`` for ``i < m``, ``j < n``: float32, fused multiply-add, in order of l.

    Args:
        a: address of the first element of a.
        am: elements from one row of a to the next.
        ak: elements from one column of a to the next (a may be given transposed).
        b: address of the first element of b; its columns lie side by side.
        bk: elements from one row of b to the next.
        c: address of the first element of c; its columns lie side by side; it overlaps neither a nor b.
        cm: elements from one row of c to the next.
        m: rows of c.
        n: columns of c.
        k: columns of a, at least 1.
    """
    j = 0
    while j + _WIDE * WIDTH <= n:
        i = 0
        while i + _WIDE_ROWS <= m:
            _wide(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += _WIDE_ROWS
        while i < m:
            _wide_one(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += 1
        j += _WIDE * WIDTH
    while j + 2 * WIDTH <= n:
        i = 0
        while i + _HALF_ROWS <= m:
            _half(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += _HALF_ROWS
        while i < m:
            _half_one(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += 1
        j += 2 * WIDTH
    while j + WIDTH <= n:
        i = 0
        while i + _ONE_ROWS <= m:
            _one(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += _ONE_ROWS
        while i < m:
            _one_one(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += 1
        j += WIDTH
    while j < n:
        i = 0
        while i + 8 <= m:
            _rest(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += 8
        while i < m:
            _rest_one(a + 4 * i * am, am, ak, b + 4 * j, bk, c + 4 * (i * cm + j), cm, k)
            i += 1
        j += 1
