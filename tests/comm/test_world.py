"""Ranks, agreement and collectives under a real mpiexec, and in a world of one rank."""

from __future__ import annotations

import numpy as np
import pytest

from hpcasync.comm import OneRank, World, agree, raise_together
from hpcasync.errors import UsageError
from tests.mpi import MpiRun

WORLD = """
import numpy as np
import torch
import hpcasync as ha
from hpcasync.comm import agree, raise_together, OneRank
from hpcasync.comm.collectives.mpi import LINE_SEGMENT, MPICollectives, SEGMENT
world = ha.init()
me, P = world.rank, world.size
assert ha.init() is world
from mpi4py import MPI
assert (me, P) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
assert (world.local_rank, world.local_size, world.node, world.nodes) == (me, P, 0, 1)
assert (world.leaders is not None) == (me == 0)
if me == 0:
    assert world.leaders.size == 1
assert world.node_comm.size == P and world.device == torch.device("cpu")
assert world.threads == 1 == torch.get_num_threads()  # OMP_NUM_THREADS
assert MPI.Comm.Compare(world.comm, MPI.COMM_WORLD) == MPI.CONGRUENT  # a duplicate: private
assert world.library.split()[0] in ("MPICH", "Open"), world.library
assert world.gather(("x", me)) == [("x", r) for r in range(P)]
"""

AGREE = """
agree(world, {"a": 1, "b": [2.5, "x"]})
odd = P - 1
for facts, names in (({"a": 1, "b": me == odd}, "b"), ({"a": (1, me == odd)}, "a")):
    try:
        agree(world, facts)
        assert P == 1
    except ha.UsageError as error:
        text = str(error)
        assert f"ranks disagree on {names}" in text and f"rank {odd} has" in text and "rank 0 has" in text, text
        assert f"rank {odd} differs" in text, text
try:
    agree(world, {"a": me})
    assert P == 1
except ha.UsageError as error:
    assert (", ".join(str(r) for r in range(1, P))) in str(error), error
raise_together(world, None)
for failing in ([0], [P - 1], list(range(P))):
    try:
        raise_together(world, f"bad thing" if me in failing else None)
        raise SystemExit("not raised")
    except ha.UsageError as error:
        expected = "bad thing" if len(failing) == P else f"rank {failing[0]}: bad thing"
        assert str(error) == expected, (error, expected)
"""

COLLECTIVES = """
variants = [world.collectives]
if P > 1:
    variants += [MPICollectives(world.comm, polite=True), MPICollectives(world.comm, polite=False)]
for c in variants:
    for dtype in (np.float32, np.float64):
        part = SEGMENT // np.dtype(dtype).itemsize
        for size in (0, 1, 3, part - 1, part, part + 1, 2 * part + 5):
            mine = (np.arange(size) % 1000 + me).astype(dtype)
            total = ((np.arange(size) % 1000) * P + sum(range(P))).astype(dtype)
            a, b, d = mine.copy(), mine.copy(), mine.copy()
            c.allreduce(a)
            first, second = c.start_allreduce(b), c.start_allreduce(d)
            while not second.test():
                pass
            first.wait()
            first.wait()  # again: no harm
            assert second.test()
            for x in (a, b, d):
                assert x.dtype == dtype and np.array_equal(x, total), (dtype, size)
    # More and longer segments than fly at a time, taken out of order; other traffic in between.
    part = LINE_SEGMENT // 4
    lots = [np.full(size, me + i, np.float32) for i, size in enumerate((1, part - 1, part, part + 1, 2 * part + 1, 3))]
    started = [c.start_allreduce(x) for x in lots]
    c.barrier()
    for i in (4, 0, 5, 2, 1, 3):
        started[i].wait()
        assert started[i].test() and (lots[i] == P * i + sum(range(P))).all(), i
    strided = np.zeros(8, np.float32)[::2]
    for bad in (np.zeros(3, np.int64), np.zeros(3, np.float16), np.zeros((2, 2), np.float32), strided):
        for call in (c.allreduce, c.start_allreduce):
            try:
                call(bad)
                raise SystemExit("not refused")
            except TypeError as error:
                assert str(bad.dtype) in str(error) and str(bad.shape) in str(error)
    for root in range(P):
        for dtype in (np.float32, np.float64, np.int64, np.bool_, np.uint8, np.int16):
            for shape in ((), (3,), (0,), (2, 5), (SEGMENT + 3,)):
                size = int(np.prod(shape))
                full = ((np.arange(size) + root) % 3).astype(dtype).reshape(shape)
                x = full.copy() if me == root else np.ones(shape, dtype)
                c.broadcast(x, root)
                assert np.array_equal(x, full), (dtype, shape, root)
    try:
        c.broadcast(np.zeros((4, 4), np.float32)[:, ::2])
        assert P == 1 and isinstance(c, OneRank)
    except TypeError as error:
        assert "contiguous" in str(error)
    c.barrier()
    pending = c.start_barrier()
    pending.wait()
    assert pending.test()
"""

BARRIER = """
# Rank 0 comes when it has heard of all others that they have not passed.
pending, word = c.start_barrier() if me else None, np.zeros(1)
for other in range(1, P):
    if me == other:
        assert not any(pending.test() for _ in range(10)), "passed before rank 0 came"
        world.comm.Send(word, dest=0)
    elif me == 0:
        world.comm.Recv(word, source=other)
pending = pending or c.start_barrier()
pending.wait()
assert pending.test()
"""


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_world_agreement_and_collectives(mpirun: MpiRun, n: int) -> None:
    done = mpirun(WORLD + AGREE + COLLECTIVES + "c = world.collectives\n" + BARRIER + "print('done')", n, timeout=200)
    assert done.stdout.count("done") == n


def test_world_of_one_rank_without_mpi() -> None:
    world = World()
    assert (world.rank, world.size, world.nodes, world.comm) == (0, 1, 1, None)
    assert world.gather("x") == ["x"]
    agree(world, {"a": 1})
    raise_together(world, None)
    with pytest.raises(UsageError, match=r"^too small$"):
        raise_together(world, "too small")


def test_one_rank_collectives() -> None:
    one, values = OneRank(), np.arange(5, dtype=np.float32)
    one.allreduce(values)
    pending = one.start_allreduce(values)
    pending.wait()
    assert pending.test() and one.start_barrier().test()
    one.broadcast(values)
    one.barrier()
    assert values.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError, match="int64"):
        one.allreduce(np.zeros(2, np.int64))
