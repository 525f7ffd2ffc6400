"""The methods live, under a real mpiexec: rounds of GSGM, the centre of EASGD, the bound of APAM, lock-free pushes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.mpi import MpiRun

HEAD = """
import time, warnings
from pathlib import Path
import numpy as np
import torch
import hpcasync as ha
from hpcasync import rules
from tests.modes.toys import flat, mlp, set_grads, train

world = ha.init()
me, P = world.rank, world.size

def logged(opt):
    "Records (version written, rank, round) of every push to shard 0."
    log = []
    worker, store = opt._worker, opt.store
    worker.observer = lambda k, read, wrote: log.append((wrote, me, int(store.clocks[me]))) if k == 0 else None
    return log

def everyone(log):
    return sorted(entry for part in world.gather(log) for entry in part)

def grads_of(model, step):
    "Small whole numbers: sums are exact in any order."
    set_grads(model, float((7 * step + 3 * me) % 5 - 2))
"""

ROUNDS = """
# Random delays, and ranks with different numbers of steps: blocks of one push of every rank that is still there.
for options in ({}, {"average": "round"}, {"window": 2}):
    model = mlp()
    opt = ha.Async(model, rules.GSGM(lr=0.01, **options))
    log = logged(opt)
    rng = np.random.default_rng(me)
    counts = [4 + 3 * r for r in range(P)]
    for step in range(counts[me]):
        time.sleep(float(rng.exponential(0.004)))
        grads_of(model, step)
        opt.step()
    opt.synchronize()
    order = everyone(log)
    assert [v for v, _, _ in order] == list(range(1, sum(counts) + 1))  # nothing lost, nothing twice
    at = 0
    for round_ in range(max(counts)):
        there = [r for r in range(P) if counts[r] > round_]
        block = order[at : at + len(there)]
        assert sorted(r for _, r, _ in block) == there, (options, round_, block)
        assert {c for _, _, c in block} == {round_}
        at += len(there)
    if not options:
        last = sum((7 * (counts[r] - 1) + 3 * r) % 5 - 2 for r in range(P))
        layout = opt.store.layout
        assert (opt.store.state[2, : layout.sizes[0]] == last).all()  # everyone's last gradient, once
    assert opt.discarded == 0 and opt.updates == counts[me]
    log.clear()
    world.collectives.barrier()  # all have looked
    for step in range(3):  # after a meeting the rounds go on, with everyone
        grads_of(model, step)
        opt.step()
    opt.synchronize()
    order = everyone(log)
    assert [r for _, r, _ in order] and all(
        sorted(r for _, r, _ in order[i : i + P]) == list(range(P)) for i in range(0, 3 * P, P)
    )
    opt.close()
"""

SLOW = """
# A rank that waits until the others are done does not stop them; each of its gradients is applied once, in rounds of their own.
model = mlp()
opt = ha.Async(model, rules.GSGM(lr=0.01, patience=0.3))
log = logged(opt)
for step in range(12):
    while me == P - 1 and step == 2 and not all(Path(f"done-{r}").exists() for r in range(P - 1)):
        time.sleep(0.01)
    grads_of(model, step)
    opt.step()
Path(f"done-{me}").touch()
opt.synchronize()
order = everyone(log)
assert [v for v, _, _ in order] == list(range(1, 12 * P + 1))
for r in range(P):
    mine = [c for _, rank, c in order if rank == r]
    assert len(mine) == 12 and len(set(mine)) == 12 and mine == sorted(mine), mine  # once per round
last = sum((7 * 11 + 3 * r) % 5 - 2 for r in range(P))
assert (opt.store.state[2, : opt.store.layout.sizes[0]] == last).all()
assert max(world.gather(opt.share.wait)[: P - 1]) > 0.2  # who excused the sleeper had waited for it
opt.close()
"""

DISCARD = """
# Discarded gradients are counted; every rank still pushes at most once per round.
model = mlp()
opt = ha.Async(model, rules.GSGM(lr=0.01, out_of_turn="discard"))
log = logged(opt)
for step in range(30):
    grads_of(model, step)
    opt.step()
    if me == 0:
        time.sleep(0.003)
assert opt.updates + opt.discarded == 30 and opt.updates == len(log)
opt.synchronize()
order = everyone(log)
assert [v for v, _, _ in order] == list(range(1, len(order) + 1))
assert len({(r, c) for _, r, c in order}) == len(order)
assert sum(world.gather(opt.discarded)) > 0
opt.close()
"""

STALLED = """
# A rank that waits for its turn says for whom: the one that does not go on until it is said.
model = mlp()
opt = ha.Async(model, rules.GSGM(lr=0.01), stall_seconds=0.2)
with warnings.catch_warnings():
    warnings.simplefilter("always")
    said = f"for the slower rank(s) [{P - 1}] (rule gsgm)"
    warnings.showwarning = lambda text, *more: me == 0 and said in str(text) and Path("said").touch()
    for step in range(3):
        while me == P - 1 and step and not Path("said").exists():
            time.sleep(0.01)
        grads_of(model, step)
        opt.step()
opt.close()
"""

CENTRE = """
# EASGD: every rank trains a copy of its own; synchronize() shows the centre.
for rule in (rules.EASGD(lr=0.1, period=4), rules.EAMSGD(lr=0.02, period=4)):
    model = mlp()
    opt = ha.Async(model, rule)
    train(opt, model, range(10), me)
    copies = world.gather(flat(model).tobytes())
    assert len(set(copies)) == P
    assert opt.store.versions.max() <= 3 * P
    opt.synchronize()
    shared = {m.tobytes() for m in world.gather(flat(model))}
    assert len(shared) == 1 and not shared & set(copies)
    layout = opt.store.layout
    assert np.array_equal(opt.store.state[0, : layout.sizes[0]], model[0].weight.detach().reshape(-1).numpy())
    model[0].weight.grad = None
    set_grads(model, float("nan"))
    before = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()  # skipped: the copy stays
    assert np.array_equal(flat(model), before) and opt.skipped == 1
    state = opt.state_dict()
    opt.load_state_dict(state)
    opt.close()
"""

OTHERS = """
# APAM has its default bound; another can be given. Hogwild's values stay finite, and the label tells.
for given, bound in ((None, 16), (3, 3)):
    opt = ha.Async(mlp(), rules.APAM(), staleness=given)
    assert opt._bound == bound
    opt.close()
opt = ha.Async(mlp(), rules.ASGD())
assert opt._bound is None
opt.close()
model = mlp()
opt = ha.Async(model, rules.Hogwild(lr=0.1))
assert opt.rule.lock_free
first = train(opt, model, range(1), me)
for _ in range(5):
    last = train(opt, model, range(20), me)
opt.synchronize()
assert np.isfinite(flat(model).view(np.float32)).all() and last < first
assert 0 < opt.store.versions.max() <= 101 * P
opt.close()
# A window that does not fit is refused on every rank.
try:
    ha.Async(mlp(), rules.GSGM(window=P + 1))
    raise SystemExit("not refused")
except ha.UsageError as error:
    assert f"at most the number of workers, {P}" in str(error)
# Saved and loaded: the sum starts anew with the private gradients, momentum stays.
model = mlp()
opt = ha.Async(model, rules.GSGM(lr=0.01))
train(opt, model, range(5), me)
opt.synchronize()
state = opt.state_dict()
assert set(state["state"][0]) == {"momentum_buffer"}
opt.load_state_dict(state)
assert (opt.store.state[2] == 0).all() and (opt.store.notes == 0).all() and (opt.store.state[1] != 0).any()
world.collectives.barrier()  # all have looked
train(opt, model, range(5), me)
opt.close()
"""


def run(mpirun: MpiRun, n: int, *parts: str, timeout: float = 200) -> None:
    done = mpirun(HEAD + "".join(parts) + "\nprint('done', flush=True)\n", n, timeout=timeout)
    assert done.stdout.count("done") == n


@pytest.mark.parametrize("n", [2, 4])
def test_rounds_of_gsgm(mpirun: MpiRun, n: int) -> None:
    run(mpirun, n, ROUNDS, SLOW)


def test_discarding_stalling_and_the_other_methods(mpirun: MpiRun) -> None:
    run(mpirun, 3, DISCARD, STALLED, CENTRE, OTHERS)


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_one_rank(mpirun: MpiRun) -> None:
    run(mpirun, 1, ROUNDS.replace(', {"window": 2}', "").replace("if not options:", "if False:"))


RULES = [
    ["staleness-aware", "--base", "momentum"], ["dc-asgd"], ["dc-asgd", "--adaptive"], ["hogwild"], ["easgd", "--period", "4"],
    ["eamsgd"], ["apam"], ["apam", "--style", "paper", "--step-size", "sqrt", "--lr", "0.005", "--low", "-1", "--high", "1"],
    ["gsgm"], ["gsgm", "--average", "round", "--base", "rmsprop", "--lr", "0.002"], ["gsgm", "--window", "2"],
    ["gsgm", "--average", "groups", "--lr", "0.2"],
]  # fmt: skip

PROGRAM = """
import contextlib, io, json, sys
from hpcasync import init
from hpcasync.cli import main
for i, argv in enumerate(json.loads(sys.argv[1])):
    assert main(["train", "--rule", *argv, "--epochs", "8", "--batch", "16", "--json", "--output", f"run{i}"]) == 0
"""


def test_every_method_trains_from_the_command_line(mpirun: MpiRun) -> None:
    done = mpirun(PROGRAM, 3, args=[json.dumps(RULES)], timeout=300)
    results: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [r["rule"] for r in results] == [argv[0] for argv in RULES]
    for argv, result in zip(RULES, results):
        assert result["test_accuracy"] > 0.8, (argv, result["test_accuracy"])
    kept = (mpirun.folder / "run6" / "config.toml").read_text()
    assert 'rule = "apam"' in kept and 'style = "code"' in kept and "bias_correction = true" in kept
