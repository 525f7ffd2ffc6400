"""The three modes on several ranks, under a real mpiexec: what must be equal is equal, bit for bit where exact."""

from __future__ import annotations

import pytest

from tests.mpi import MpiRun

HEAD = """
import copy, time, warnings
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
import hpcasync as ha
from hpcasync import rules
from tests.modes.toys import MODES, batch, flat, make, mlp, set_grads, train

world = ha.init()
me, P = world.rank, world.size

def same(array):
    "Whether all ranks have these bits."
    return len({np.ascontiguousarray(a).tobytes() for a in world.gather(array)}) == 1

def refused(call, *says):
    try:
        call()
    except ha.UsageError as error:
        for part in says:
            assert part in str(error), error
        return
    raise SystemExit(f"not refused: {says}")

def dyadic(seed=0):
    "Parameters and gradients are small multiples of 1/64: sums and means over 2 or 4 ranks are exact."
    model = nn.Linear(5, 3)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-64, 64, p.shape, generator=rng) / 64)
    return model

def dyadic_grads(model, step, rank):
    rng = torch.Generator().manual_seed(100 * step + rank)
    for p in model.parameters():
        p.grad = torch.randint(-64, 64, p.shape, generator=rng) / 64
"""

START = """
# Every mode starts from rank 0's model and buffers, and ends with the same model everywhere.
for mode in MODES:
    model = mlp(seed=me)
    opt = make(mode, model, None)
    assert same(flat(model)) and np.array_equal(flat(model), flat(mlp(0))), mode
    train(opt, model, range(5), me)
    kept = copy.deepcopy(model)
    assert np.array_equal(flat(kept), flat(model))
    opt.synchronize()
    assert same(flat(model)), mode
    assert not np.array_equal(flat(model), flat(mlp(0)))
    opt.close()
    opt.close()
    assert same(flat(model)) and torch.isfinite(model(batch(0)[0])).all(), mode
    assert opt.steps == opt.updates == 5
    if mode == "async":
        for call in (opt.step, opt.synchronize, opt.publish, opt.state_dict):
            refused(call, "closed")
"""

BUFFERS = """
# BatchNorm: equal at the start, per rank in between, averaged (integers: rank 0's) when synchronised.
def normed():
    torch.manual_seed(me)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net[1].running_mean.fill_(me + 1.0)
    net[1].num_batches_tracked.fill_(10 * (me + 1))
    net.register_buffer("flag", torch.tensor([me == 0]))
    net.register_buffer("empty", torch.zeros(0))
    return net
for mode in MODES:
    net = normed()
    opt = make(mode, net, None)
    bn = net[1]
    assert (bn.running_mean == 1).all() and bn.num_batches_tracked == 10 and net.flag.item(), mode
    train(opt, net, range(3 + me if mode == "async" else 3), me)
    mine = bn.running_mean.numpy().copy()
    assert not same(mine) or P == 1, mode
    assert bn.num_batches_tracked == (13 + me if mode == "async" else 13)
    bn.num_batches_tracked += me
    opt.synchronize()
    mean = np.mean([np.float64(m) for m in world.gather(mine)], 0)
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=1e-6)
    assert same(bn.running_mean.numpy()) and same(bn.running_var.numpy())
    assert bn.num_batches_tracked == 13 and bn.num_batches_tracked.dtype == torch.int64 and net.flag.item()
    opt.close()
net = normed()
opt = ha.Sync(torch.optim.SGD(net.parameters(), lr=0.1))  # no model: its buffers are not touched
opt.synchronize()
assert (net[1].running_mean == me + 1).all()
opt.close()
"""

SYNC = """
# One step of P ranks is one step on the concatenated batch; all ranks have the same bits; two runs are equal.
finals = []
for repeat in range(2):
    model = mlp()
    opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), bucket_mb=1e-4)
    assert len(opt._buckets) > 2
    train(opt, model, range(8), me)
    assert same(flat(model))
    finals.append(flat(model))
    opt.close()
assert np.array_equal(*finals)
alone = mlp()
inner = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
for step in range(8):
    x, y = (torch.cat(parts) for parts in zip(*[batch(step, r) for r in range(P)]))
    inner.zero_grad()
    F.cross_entropy(alone(x), y).backward()
    inner.step()
for p, q in zip(model.parameters(), alone.parameters()):
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

# The gradient is the mean when backward returns: clipping sees it.
model = dyadic()
opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=1.0))
(model(torch.ones(1, 5)).sum() * (me + 1)).backward()
mean = (P + 1) / 2
assert all((p.grad == mean).all() for p in model.parameters())
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
assert abs(norm.item() - mean * 18**0.5) < 1e-5
before = [p.detach().clone() for p in model.parameters()]
opt.step()
assert same(flat(model))
assert abs(sum(((p.detach() - b) ** 2).sum() for p, b in zip(model.parameters(), before)) - 1) < 1e-4

def grads():
    return {float(v) for p in model.parameters() for v in p.grad.flatten()}
one = torch.ones(1, 5)
def back(k):
    (model(one).sum() * k).backward()

# Two backwards add up their means; no_sync keeps a backward local until the next one, or until step().
for reset in (True, False):
    opt.zero_grad(reset)
    back(me); back(2 * me)
    assert grads() == {3 * (P - 1) / 2}, grads()
    opt.zero_grad(reset)
    with opt.no_sync():
        back(me)
        assert grads() == {float(me)}
    back(10 * me)
    assert grads() == {11 * (P - 1) / 2}
    opt.zero_grad(reset)
    with opt.no_sync():
        back(me)
    old = model.bias.detach().clone()
    opt.step()
    assert torch.equal(model.bias, old - (P - 1) / 2) and same(flat(model))
    opt.zero_grad(reset)
    back(me)  # averaged ...
    with opt.no_sync():
        back(4 * me)  # ... then a local one
    old = model.bias.detach().clone()
    opt.step()
    assert torch.equal(model.bias, old - 5 * (P - 1) / 2), (model.bias - old)
    assert same(flat(model))
opt.close()

# A parameter without a gradient on some ranks counts as zero there; without one anywhere it has none.
model = nn.ModuleList([nn.Linear(2, 1) for _ in range(3)])
opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1.0))
x = torch.ones(1, 2)
for _ in range(3):
    opt.zero_grad()
    never = flat(model[2])
    (model[0](x) + (model[1](x) if me == 0 else 0)).sum().backward()
    assert all((p.grad == 1).all() for p in model[0].parameters())
    assert all((p.grad == 1 / P).all() for p in model[1].parameters())
    assert all(p.grad is None for p in model[2].parameters())
    opt.step()
    assert np.array_equal(flat(model[2]), never) and same(flat(model))
opt.zero_grad()
opt.step()  # nobody has any
opt.close()

# Frozen at the start, unfrozen later, alone at that: averaged by the end of backward.
model = mlp()
model[0].requires_grad_(False)
opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=0.1))
train(opt, model, range(2), me)
model[0].requires_grad_(True); model[2].requires_grad_(False); model[4].requires_grad_(False)
opt.zero_grad()
model(batch(9, me)[0]).square().sum().backward()
assert same(model[0].weight.grad.numpy())
before = flat(model[0])
opt.step()
assert same(flat(model)) and not np.array_equal(flat(model[0]), before)
opt.close()

# Recomputed segments (reentrant checkpoints run a backward inside a backward).
from torch.utils.checkpoint import checkpoint
model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=0.1), bucket_mb=1e-4)
for step in range(3):
    opt.zero_grad()
    h = batch(step, me)[0].requires_grad_()
    for part in model:
        h = torch.tanh(checkpoint(part, h, use_reentrant=True))
    h.sum().backward()
    opt.step()
    assert same(flat(model))
opt.close()

# LBFGS: ranks with different data take the same decisions.
model = nn.Linear(6, 3)
opt = ha.Sync(torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe"))
x, y = batch(0, me, 64)
def closure():
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss
losses = [float(opt.step(closure)) for _ in range(4)]
assert same(np.array(losses)) and same(flat(model)) and losses[-1] < 0.9 * losses[0], losses
opt.close()
"""

KSTEP = """
# K = 1, mu = 0, SGD is Sync; mu = 0 is K-AVG (the mean of the ranks' models): exact with dyadic numbers.
models = [dyadic() for _ in range(2)]
inner = [torch.optim.SGD(m.parameters(), lr=0.5) for m in models]
opts = [ha.Sync(inner[0]), ha.KStep(inner[1], every=1)]
for step in range(6):
    for m, o in zip(models, opts):
        dyadic_grads(m, step, me)
        o.step()
    if P in (1, 2, 4):
        assert np.array_equal(flat(models[0]), flat(models[1])), step
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q)
    assert same(flat(models[1]))
for o in opts:
    o.close()

# Block momentum against a simulation of all ranks in float64; Nesterov, block rate and warm start too.
for options in (dict(every=2), dict(every=2, block_momentum=0.5), dict(every=1, block_momentum=0.5, block_lr=0.5),
                dict(every=2, block_momentum=0.5, nesterov=True), dict(every=3, block_momentum=0.5, warm_start=4)):
    model, mu, lr = dyadic(), options.get("block_momentum", 0.0), options.get("block_lr", 1.0)
    opt = ha.KStep(torch.optim.SGD(model.parameters(), lr=0.5), **options)
    sims = [dyadic().double() for _ in range(P)]
    anchor = [p.detach().clone() for p in sims[0].parameters()]
    velocity, since, averages = [torch.zeros_like(a) for a in anchor], 0, 0
    for step in range(1, 9):
        dyadic_grads(model, step, me)
        opt.step()
        for r, s in enumerate(sims):
            twin = dyadic()
            dyadic_grads(twin, step, r)
            with torch.no_grad():
                for p, q in zip(s.parameters(), twin.parameters()):
                    p -= 0.5 * q.grad
        since += 1
        warm = step <= options.get("warm_start", 0)
        if warm or since == options["every"]:
            since = 0
            averages += 1
            for i, ps in enumerate(zip(*[s.parameters() for s in sims])):
                mean = sum(p.detach() for p in ps) / P
                d = mean - anchor[i]
                velocity[i] = velocity[i] if warm else mu * velocity[i] + lr * d
                step_by = lr * d + mu * velocity[i] if options.get("nesterov") else velocity[i]
                w = mean if warm else anchor[i] + step_by
                anchor[i] = w.clone()
                for p in ps:
                    p.data = w.clone()
            assert same(flat(model)), (options, step)
        for p, q in zip(model.parameters(), sims[me].parameters()):
            if P in (1, 2, 4):
                assert torch.equal(p.detach().double(), q.detach()), (options, step, (p - q).abs().max())
            else:
                torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-5)
    assert opt.averages == averages, options
    opt.close()

# The wrapped optimizer's state: kept, averaged, or reset.
for how in ("keep", "average", "reset"):
    model = dyadic()
    opt = ha.KStep(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5), every=2, inner_state=how)
    for step in range(2):
        set_grads(model, float(me + 1))
        opt.step()
    buffers = [v["momentum_buffer"] for v in opt.state.values() if v]
    assert len(buffers) == (0 if how == "reset" else 2)
    wanted = 1.5 * (me + 1 if how == "keep" else (P + 1) / 2)
    assert all(torch.allclose(b, torch.full_like(b, wanted)) for b in buffers), (how, buffers)
    opt.close()

# Frozen parameters do not move, not even by an ulp, nor by momentum from before they were frozen.
model = mlp()
model[0].requires_grad_(False)
opt = make("kstep", model, None)
first = flat(model[0])
train(opt, model, range(6), me)
assert np.array_equal(flat(model[0]), first)
model[0].requires_grad_(True); model[2].requires_grad_(False)
second = flat(model[2])
train(opt, model, range(6, 12), me)
assert np.array_equal(flat(model[2]), second) and not np.array_equal(flat(model[0]), first) and same(flat(model))
opt.close()
"""

RESUME = """
# Train 2N = train N, save, load in fresh objects, train N: bit for bit on every rank (KStep also within a block).
import io
for mode, n in (("sync", 4), ("kstep", 6), ("kstep", 4)):
    whole = mlp()
    opt = make(mode, whole, None)
    train(opt, whole, range(2 * n), me)
    opt.close()
    half = mlp()
    opt = make(mode, half, None)
    train(opt, half, range(n), me)
    file = io.BytesIO()
    torch.save((half.state_dict(), opt.state_dict()), file)
    opt.close()
    file.seek(0)
    weights, state = torch.load(file)
    fresh = mlp(seed=9)
    opt = make(mode, fresh, None, lr=1.0)
    fresh.load_state_dict(weights)
    opt.load_state_dict(state)
    train(opt, fresh, range(n, 2 * n), me)
    opt.close()
    assert np.array_equal(flat(fresh), flat(whole)), (mode, n)
# Async: rank 0's state reaches all; publish() makes rank 0's model the shared one.
model = mlp()
opt = make("async", model, None)
train(opt, model, range(5), me)
opt.synchronize()
weights, state = copy.deepcopy(model.state_dict()), opt.state_dict()
vectors = {n: v for n, v in state["state"][0].items()}
assert state["hpcasync"]["versions"] == [5 * P] and any(v.any() for v in vectors.values())
world.collectives.barrier()
train(opt, model, range(5, 8), me)
opt.synchronize()
model.load_state_dict(weights)
opt.load_state_dict(state)
assert same(flat(model)) and all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
again = opt.state_dict()
assert again["hpcasync"]["versions"] == [5 * P] and (opt.steps, opt.updates) == (5, 5)
assert all(torch.equal(v, again["state"][i][n]) for i, s in state["state"].items() for n, v in s.items())
world.collectives.barrier()
with torch.no_grad():
    for p in model.parameters():
        p.fill_(me + 1.0)
opt.publish()
assert all((p == 1).all() for p in model.parameters())
world.collectives.barrier()
set_grads(model, 0.0)
with warnings.catch_warnings():
    warnings.simplefilter("error")  # nothing was changed behind the optimizer's back since
    opt.step()
with torch.no_grad():
    model[0].weight.fill_(77.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    set_grads(model, 0.0)
    opt.step()
assert any("publish()" in str(w.message) for w in caught)
assert not (model[0].weight == 77).any()
opt.close()
"""

NONFINITE = """
# NaN on the last rank. Async: only its push is skipped. Sync: all skip. KStep: only the local step.
for mode in MODES:
    for closure in (False, True):
        model = dyadic()
        options = dict(every=2, block_momentum=0.0) if mode == "kstep" else {}
        if mode == "async":
            opt = ha.Async(model, rules.ASGD(lr=1.0))
        else:
            opt = make(mode, model, None, **options)
        start = [p.detach().clone() for p in model.parameters()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (1, 2, 3, 4):
                def grads():
                    set_grads(model, 1.0)
                    if me == P - 1 and step in (2, 4):
                        model.bias.grad[1] = float("nan")
                    return torch.tensor(1.0)
                if closure:
                    opt.step(grads)
                else:
                    grads()
                    opt.step()
        skips = mode == "sync" or me == P - 1
        assert (opt.steps, opt.updates, opt.skipped) == (4, 2 if skips else 4, 2 if skips else 0), (mode, opt.skipped)
        texts = [str(w.message) for w in caught if "NaN" in str(w.message)]
        assert len(texts) == (1 if skips else 0), texts
        assert all(f"rank {P - 1}, step 2" in t for t in texts), texts
        opt.synchronize()
        assert same(flat(model)) and torch.isfinite(model.weight).all()
        if mode == "async":
            assert all(torch.equal(p, s - (4 * P - 2)) for p, s in zip(model.parameters(), start))
        opt.close()
"""

ASYNC = """
# Gradients of -1 with lr 1 count pushes. Ranks take different numbers of steps; the sum is exact; all terminate.
model = mlp()
opt = ha.Async(model, rules.ASGD(lr=1.0))
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
opt.publish()
world.collectives.barrier()
steps = 10 + 7 * me
for _ in range(steps):
    set_grads(model, -1.0)
    opt.step()
opt.synchronize()
total = sum(10 + 7 * r for r in range(P))
assert all((p == total).all() for p in model.parameters()), next(model.parameters())
assert opt.staleness.summary()["max"] >= 0 and opt.staleness.counts.sum() == steps
# After synchronize() all go on in step again, though they had taken different numbers of steps.
for _ in range(5):
    set_grads(model, -1.0)
    opt.step()
opt.close()
assert all((p == total + 5 * P).all() for p in model.parameters())

# The bound holds for what a rank has read: after its step k it has all ranks' pushes up to k - bound.
import hpcasync.modes.asynchronous as module
real = module.make_layout
module.make_layout = lambda sizes, *shard: real(sizes, 16)  # many shards: a wide window for races
for bound in (0, 2):
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = ha.Async(model, rules.ASGD(lr=1.0), staleness=bound)
    for k in range(1, 41):
        if me == P - 1 and k % 10 == 0:
            time.sleep(0.01)
        set_grads(model, -1.0)
        opt.step()
        values = flat(model).view(np.float32)
        least = k + (P - 1) * max(0, k - bound)
        most = k + (P - 1) * min(40, k + bound + 1)
        assert least <= values.min() and values.max() <= most, (k, bound, least, values.min(), values.max(), most)
    assert opt.staleness.summary()["max"] <= (P - 1) * (2 * bound + 1), opt.staleness.summary()
    opt.synchronize()
    assert (flat(model).view(np.float32) == 40 * P).all()
    opt.close()
module.make_layout = real

# A bound and different numbers of steps: who is done waits in close() and holds nobody up.
model = mlp()
opt = ha.Async(model, rules.ASGD(lr=1.0), staleness=0)
for _ in range(3 + 4 * me):
    set_grads(model, -1.0)
    opt.step()
opt.close()
assert same(flat(model))

# Who waits long says for whom: the one that does not go on until it is said.
model = mlp()
with ha.Async(model, rules.ASGD(lr=1.0), staleness=0, stall_seconds=0.1) as opt:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        said = f"for the slower rank(s) [{P - 1}] (staleness=0)"
        warnings.showwarning = lambda text, *more: me == 0 and said in str(text) and Path("said").touch()
        for _ in range(2):
            while me == P - 1 and not Path("said").exists():
                time.sleep(0.01)
            set_grads(model, -1.0)
            opt.step()

# Parameters without a gradient on this rank are still read; frozen ones stay.
model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
model[2].requires_grad_(False)
opt = ha.Async(model, rules.ASGD(lr=1.0))
before = [flat(m).view(np.float32).copy() for m in model]
world.collectives.barrier()
for _ in range(4):
    opt.zero_grad()
    set_grads(model[0], -1.0)
    if me == 0:
        set_grads(model[1], -1.0)
    opt.step()
opt.synchronize()
now = [flat(m).view(np.float32) for m in model]
np.testing.assert_allclose(now[0], before[0] + 4 * P, rtol=1e-5)
np.testing.assert_allclose(now[1], before[1] + 4, rtol=1e-5)
np.testing.assert_array_equal(now[2], before[2])
opt.close()
"""

DISAGREE = """
# Ranks that disagree: a UsageError on every rank that names the odd one. Nobody hangs.
odd = me == P - 1
who = f"rank {P - 1} differs from rank 0"
def bn(n):
    return nn.Sequential(nn.Linear(6, n), nn.BatchNorm1d(n))
for mode in MODES:
    refused(lambda: make(mode, nn.Linear(6, 4 if odd else 3), None), "parameter shapes", who)
    refused(lambda: make(mode, bn(4 if odd else 3), None), "buffers", who)
    refused(lambda: make(mode, nn.Linear(6, 4) if odd else bn(4), None), "differ")
    refused(lambda: make(mode, mlp(), None, lr=0.1 if odd else 0.2), "options" if mode != "async" else "the rule", who)
    refused(lambda: make(mode, mlp(), None, on_nonfinite="abort" if odd else "skip"), "on_nonfinite", who)
refused(lambda: make("kstep", mlp(), None, every=2 if odd else 3), "every", who)
refused(lambda: make("kstep", mlp(), None, block_momentum=0.1 if odd else 0.2), "block_momentum", who)
refused(lambda: make("sync", mlp(), None, bucket_mb=1 if odd else 2), "bucket_mb", who)
refused(lambda: make("async", mlp(), None, staleness=3 if odd else None), "staleness", who)
refused(lambda: make("sync" if odd else "kstep", mlp(), None))
refused(lambda: make("async" if odd else "sync", mlp(), None))
refused(lambda: ha.Async(mlp(), rules.ASGD() if odd else rules.TrendSmooth()), "the rule", who)
refused(lambda: ha.Sync((torch.optim.Adam if odd else torch.optim.SGD)(mlp().parameters(), lr=0.1)), "optimizer", who)
"""

LEARN = """
# A small CNN on images of four bars learns in every mode: well below chance loss (log 4 = 1.39).
def data(rank, size=192):
    rng = torch.Generator().manual_seed(rank)
    y = torch.randint(0, 4, (size,), generator=rng)
    x = 0.6 * torch.randn(size, 1, 8, 8, generator=rng)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] += 1
    return x, y
x, y = data(me)
held, labels = data(99)
for mode in MODES:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    opt = make(mode, net, None, lr=0.02)
    for step in range(60):
        i = 32 * (step % 6)
        opt.zero_grad()
        F.cross_entropy(net(x[i : i + 32]), y[i : i + 32]).backward()
        opt.step()
    opt.synchronize()
    net.eval()
    with torch.no_grad():
        loss = F.cross_entropy(net(held), labels).item()
    assert loss < 0.35, (mode, loss)
    assert same(flat(net))
    shares = opt.share.shares()
    assert abs(sum(shares.values()) - 1) < 1e-6 and shares["compute"] > 0 and opt.share.communicate > 0
    opt.close()
"""


def run(mpirun: MpiRun, n: int, *parts: str, timeout: float = 200) -> None:
    done = mpirun(HEAD + "".join(parts) + "\nprint('done', flush=True)\n", n, timeout=timeout)
    assert done.stdout.count("done") == n


@pytest.mark.parametrize("n", [2, 3])
def test_synchronous(mpirun: MpiRun, n: int) -> None:
    run(mpirun, n, START, BUFFERS, SYNC, KSTEP)


def test_asynchronous_and_failures(mpirun: MpiRun) -> None:
    run(mpirun, 2, ASYNC, NONFINITE, RESUME, DISAGREE)


def test_four_ranks(mpirun: MpiRun) -> None:
    run(mpirun, 4, START, ASYNC, LEARN)


def test_forgotten_close(mpirun: MpiRun) -> None:
    """A script that never calls close() ends well, also when its ranks take different numbers of steps."""
    body = """
model = mlp()
opts = [make(mode, mlp(), None) for mode in MODES] + [make("async", model, None)]
train(opts[-1], model, range(4 + 3 * me), me)
"""
    run(mpirun, 2, body)


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_one_rank_under_mpiexec(mpirun: MpiRun) -> None:
    run(mpirun, 1, START, BUFFERS, SYNC, KSTEP, NONFINITE)


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
@pytest.mark.parametrize("mode", ["async", "sync", "kstep"])
def test_abort_on_nonfinite_ends_the_job(mpirun: MpiRun, mode: str) -> None:
    body = f"""
model = mlp()
opt = make({mode!r}, model, None, on_nonfinite="abort")
for step in range(1000):
    set_grads(model, float("nan") if me == 1 and step == 2 else 1.0)
    opt.step()
    time.sleep(0.01)
"""
    done = mpirun(HEAD + body, 2, check=False)
    assert done.returncode != 0
    assert "FloatingPointError: rank 1, step 3: NaN or infinity in the gradient" in done.stderr
