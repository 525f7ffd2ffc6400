"""Guided SGD against plain numpy (softmax regression), on one rank and two, around Sync and Async."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hpcasync as ha
from hpcasync.comm import World
from hpcasync.data import open_dataset, verification_batch
from hpcasync.errors import UsageError
from hpcasync.modes import Guided, KStep
from tests.mpi import MpiRun

FEATURES, CLASSES, BATCH, LR = 6, 3, 4, 0.3
mpich = pytest.mark.parametrize("lane", ["mpich"], indirect=True)


def data(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, FEATURES))
    # Noisy labels: some batches agree with the verification loss, others do not.
    y = (x[:, 0] + 1.5 * rng.normal(size=size) > 0).astype(int) + (x[:, 1] + rng.normal(size=size) > 1)
    return x, y


def batches(rank: int, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [data(1000 * rank + s + 1, BATCH) for s in range(steps)]


def as_torch(batch: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(batch[0], dtype=torch.float32), torch.tensor(batch[1])


def model_of_zeros() -> nn.Linear:
    model = nn.Linear(FEATURES, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    return model


def softmax(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    z = x @ w.T
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def loss_of(w: np.ndarray, batch: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = batch
    return float(-np.log(softmax(w, x)[np.arange(len(y)), y]).mean())


def grad_of(w: np.ndarray, batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    x, y = batch
    return (softmax(w, x) - np.eye(CLASSES)[y]).T @ x / len(y)


def reference(ranks: int, steps: int, rho: int | None, momentum: float = 0.0) -> dict[str, Any]:
    """gSSGD in plain numpy; one rank is gASGD too."""
    w, v = np.zeros((CLASSES, FEATURES)), np.zeros((CLASSES, FEATURES))
    mine = [batches(r, steps) for r in range(ranks)]
    check = [data(77 + r, 20) for r in range(ranks)]
    memory: list[int] = []
    psi = [dict[int, float]() for _ in range(ranks)]
    before, replayed, gradients = np.nan, [], 0

    def update(parts: list[np.ndarray]) -> None:
        nonlocal w, v
        v = momentum * v + sum(parts) / ranks
        w = w - LR * v

    for s in range(steps):
        update([grad_of(w, mine[r][s]) for r in range(ranks)])
        if rho is None:
            continue
        now = float(np.mean([loss_of(w, c) for c in check]))
        sign = 1 if now < before else -1
        for r in range(ranks):
            for h in memory:
                psi[r][h] = psi[r].get(h, 0.0) + sign * (before - loss_of(w, mine[r][h]))
        before = now
        memory.append(s)
        if len(memory) == rho:
            chosen = []
            for r in range(ranks):
                best = sorted(((p, -h) for h, p in psi[r].items() if p > 0), reverse=True)[: min(4, rho // 2)]
                chosen.append([-h for _, h in best])
            for i in range(max(map(len, chosen))):
                update([grad_of(w, mine[r][c[i]]) if i < len(c) else np.zeros_like(w) for r, c in enumerate(chosen)])
            gradients += sum(map(len, chosen))
            replayed.append([[h + 1 for h in c] for c in chosen])
            memory, psi = [], [{} for _ in range(ranks)]
    return {"w": w, "replayed": replayed, "gradients": gradients}


def run(mode: str, steps: int, rho: int | None, world: World, momentum: float = 0.0, lr: float = LR) -> dict[str, Any]:
    """The same with hpcasync, on this rank."""
    model = model_of_zeros()
    if mode == "async":
        rule = ha.rules.ASGD(lr=lr, base="momentum", momentum=momentum) if momentum else ha.rules.ASGD(lr=lr)
        opt: Any = ha.Async(model, rule, world=world)
    else:
        opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), model=model, world=world)
    check = as_torch(data(77 + world.rank, 20))
    guided = Guided(opt, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), check, rho=rho)
    replayed = []
    for s, batch in enumerate(batches(world.rank, steps), start=1):
        guided.step(as_torch(batch))
        if rho is not None and s % rho == 0:
            replayed.append(list(guided.last_replayed))
    guided.close()
    w = model.weight.detach().numpy().copy()
    return {"w": w, "replayed": replayed, "guided": guided, "updates": opt.updates}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("rho", "momentum"), [(2, 0.0), (5, 0.0), (10, 0.0), (10, 0.9)])
def test_one_rank_equals_numpy(mode: str, rho: int, momentum: float) -> None:
    steps = 40
    expected, found = reference(1, steps, rho, momentum), run(mode, steps, rho, World(), momentum)
    assert found["replayed"] == [r[0] for r in expected["replayed"]]
    assert expected["gradients"] > 0
    np.testing.assert_allclose(found["w"], expected["w"], atol=2e-4)
    guided = found["guided"]
    assert guided.gradients == guided.replays == expected["gradients"]
    assert found["updates"] == steps + guided.gradients
    # one for the verification batch after every step, and in each round 0 + 1 + ... + (rho - 1) scores
    assert guided.evaluations == steps + steps // rho * (rho * (rho - 1) // 2)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_without_rho_it_is_the_wrapped_optimizer_bit_for_bit(mode: str) -> None:
    model = model_of_zeros()
    if mode == "async":
        opt: Any = ha.Async(model, ha.rules.ASGD(lr=LR), world=World())
    else:
        opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=LR), model=model, world=World())
    for batch in batches(0, 23):
        x, y = as_torch(batch)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    opt.close()
    found = run(mode, 23, None, World())
    assert np.array_equal(found["w"], model.weight.detach().numpy())
    assert (found["guided"].evaluations, found["guided"].gradients) == (0, 0)
    # A round that is never full changes nothing either.
    assert np.array_equal(run(mode, 23, 24, World())["w"], found["w"])


def test_gssgd_on_two_ranks_equals_numpy(mpirun: MpiRun) -> None:
    expected = reference(2, 40, 10)
    assert any(len(a) != len(b) for a, b in expected["replayed"])  # a rank without a replay takes part with zero
    done = mpirun(
        """
        import json
        import hpcasync as ha
        from tests.modes.test_guided import run

        world = ha.init()
        found = run("sync", 40, 10, world)
        guided = found["guided"]
        everything = world.gather((found["w"].tolist(), found["replayed"], guided.gradients, guided.replays))
        if world.rank == 0:
            print(json.dumps(everything))
        """
    )
    ranks = json.loads(done.stdout)
    assert ranks[0][0] == ranks[1][0]
    np.testing.assert_allclose(ranks[0][0], expected["w"], atol=2e-4)
    assert [list(pair) for pair in zip(ranks[0][1], ranks[1][1], strict=True)] == expected["replayed"]
    assert ranks[0][2] + ranks[1][2] == expected["gradients"]
    assert ranks[0][3] == ranks[1][3] == sum(max(map(len, pair)) for pair in expected["replayed"])


def test_gasgd_on_two_ranks_goes_its_own_way(mpirun: MpiRun) -> None:
    done = mpirun(
        """
        import json
        import hpcasync as ha
        from tests.modes.test_guided import run

        world = ha.init()
        # Ranks may take different numbers of steps; at this rate the loss falls whoever comes first, at 0.3 it may not.
        found = run("async", 40 + 10 * world.rank, 10, world, lr=0.02)
        guided = found["guided"]
        everything = world.gather((found["w"].tolist(), guided.gradients, guided.replays, found["updates"]))
        if world.rank == 0:
            print(json.dumps(everything))
        """
    )
    ranks = json.loads(done.stdout)
    assert ranks[0][0] == ranks[1][0] and np.isfinite(ranks[0][0]).all()
    for rank, (_, gradients, replays, updates) in enumerate(ranks):
        assert gradients == replays > 0 and updates == 40 + 10 * rank + replays
    assert loss_of(np.array(ranks[0][0]), data(9, 200)) < np.log(CLASSES)


def test_scores_leave_training_alone() -> None:
    """Scores are taken in evaluation mode: no statistics change, no random number is drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    model[1].eval()  # frozen by the user: stays so
    opt = ha.Sync(torch.optim.SGD(model.parameters(), lr=0.1), model=model, world=World())
    modes = []

    def loss(batch: Any) -> torch.Tensor:
        modes.append(model[2].training)
        return F.cross_entropy(model(batch[0]), batch[1])

    guided = Guided(opt, loss, as_torch(data(1, 10)), rho=3)
    for batch in batches(0, 2):
        guided.step(as_torch(batch))
    assert modes == [True, False, True, False, False]
    assert model.training and model[2].training and not model[1].training
    guided.close()


@pytest.mark.parametrize("rho", [1, 0, -3, 2.5, True, "10"])
def test_bad_rho(rho: Any) -> None:
    opt = ha.Sync(torch.optim.SGD(model_of_zeros().parameters(), lr=0.1), world=World())
    with pytest.raises(UsageError, match="expected a whole number >= 2"):
        Guided(opt, lambda batch: batch, None, rho=rho)


def test_bad_mode() -> None:
    opt = KStep(torch.optim.SGD(model_of_zeros().parameters(), lr=0.1), world=World())
    with pytest.raises(UsageError, match="wraps a Sync or an Async; found KStep"):
        Guided(opt, lambda batch: batch, None)  # type: ignore[arg-type]


def test_verification_batch() -> None:
    digits = open_dataset("digits")
    x, y = verification_batch(digits)
    assert len(x) == len(y) == 100 and x.dtype == torch.float32
    assert torch.equal(x, verification_batch(digits)[0])
    assert not torch.equal(x, verification_batch(digits, seed=1)[0])
    assert len(verification_batch(digits, 1438)[1]) == 1438
    with pytest.raises(UsageError, match="verification set of 1439 samples, but the training data have 1438"):
        verification_batch(digits, 1439)
    with pytest.raises(UsageError, match="verification is 0"):
        verification_batch(digits, 0)


@pytest.mark.parametrize("mode", ["sync", "async"])
@mpich
def test_command_line(mpirun: MpiRun, mode: str) -> None:
    args = ["train", "--mode", mode, "--guided", "--rho", "6", "--epochs", "2", "--batch", "16", "--json"]
    done = mpirun.cli([*args, "--output", "run"], 2)
    result = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    cost, steps = result["guided"], 2 * 45
    assert cost["rho"] == 6 and cost["gradients"] > 0
    assert cost["evaluations"] == 2 * (steps + steps // 6 * 15)
    assert result["updates"] == cost["replays"] + steps * (1 if mode == "sync" else 2)
    text = (mpirun.folder / "run" / "config.toml").read_text()
    assert "guided = true" in text and "rho = 6" in text


@mpich
def test_command_line_bad_input(mpirun: MpiRun) -> None:
    for args, words in (
        (["--guided", "--rho", "1"], "--rho=1: expected a whole number >= 2"),
        (["--rho", "4"], "--rho belongs to guided SGD"),
        (["--guided", "--verification", "5000"], "verification set of 5000 samples, but the training data have 1438"),
        (["--guided", "--mode", "kstep"], "--guided belongs to mode async, sync"),
    ):
        done = mpirun.cli(["train", *args], 2, check=False)
        assert done.returncode == 2 and done.stderr.count("error:") == 1 and words in done.stderr, done.stderr


@mpich
def test_the_simulator_makes_the_same_run(mpirun: MpiRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """gSSGD on two ranks and on two virtual workers: the same choices, costs and model up to rounding."""
    keys = ["--mode", "sync", "--guided", "--rho", "5", "--epochs", "2", "--model", "logistic", "--lr", "0.02", "--json"]
    live = json.loads(mpirun.cli(["train", *keys, "--output", "live"], 2).stdout.rstrip("\n").split("\n")[-1])
    done = mpirun.cli(["simulate", *keys, "--workers", "2", "--output", "simulated"], None)
    simulated = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    assert live["guided"] == simulated["guided"] and live["guided"]["gradients"] > 0
    assert live["updates"] == simulated["updates"]
    for key in ("test_loss", "train_loss", "test_accuracy"):
        assert simulated[key] == pytest.approx(live[key], rel=1e-4)
