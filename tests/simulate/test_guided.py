"""Guided SGD in the simulator: against plain numpy, against the live optimizers at one worker, its costs, bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hpcasync as ha
from hpcasync.cli import main
from hpcasync.comm import World
from hpcasync.data import Dataset, Loader, verification_batch
from hpcasync.errors import UsageError
from hpcasync.modes import Guided
from hpcasync.modes.local import torch_optimizer
from hpcasync.simulate import make_simulate_config
from hpcasync.simulate.simulation import Place
from tests.simulate.toys import CLASSES, FEATURES, bits, mlp, run, simulation

LR, EPOCHS, VERIFICATION = 0.3, 3, 20
KEYS: dict[str, Any] = {"guided": True, "verification": VERIFICATION, "rule": "plain", "lr": LR, "epochs": EPOCHS}


def zeros() -> nn.Linear:
    model = nn.Linear(FEATURES, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    return model


def loss_and_gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    z = x @ w.T
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return float(-np.log(p[np.arange(len(y)), y]).mean()), (p - np.eye(CLASSES)[y]).T @ x / len(y)


class Reference:
    """One worker of the formula: its batches, its memory, its scores."""

    def __init__(self, data: Dataset, worker: int, workers: int, rho: int, epochs: int) -> None:
        self.samples, self.rho = data.as_torch("train"), rho
        loader = Loader(data, Place(worker, workers), batch=4, seed=0)
        self.plan: list[np.ndarray] = []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            self.plan += loader.indices()
        self.check = [t.numpy() for t in verification_batch(data, VERIFICATION, 0)]
        self.memory: list[np.ndarray] = []
        self.psi: list[float] = []
        self.before = np.nan
        self.evaluations = self.gradients = 0
        self.copy = np.zeros((CLASSES, FEATURES))

    def on(self, w: np.ndarray, indices: np.ndarray) -> tuple[float, np.ndarray]:
        x, y = (t.numpy() for t in self.samples.batch(indices))
        return loss_and_gradient(w, x.astype(float), y)

    def score(self, w: np.ndarray, batch: np.ndarray) -> list[np.ndarray]:
        """After an update with ``batch``; returns what to replay."""
        now = loss_and_gradient(w, self.check[0].astype(float), self.check[1])[0]
        sign = 1 if now < self.before else -1
        for h, old in enumerate(self.memory):
            self.psi[h] += sign * (self.before - self.on(w, old)[0])
        self.evaluations += 1 + len(self.memory)
        self.before = now
        self.memory.append(batch)
        self.psi.append(0.0)
        if len(self.memory) < self.rho:
            return []
        order = sorted((h for h in range(self.rho) if self.psi[h] > 0), key=lambda h: -self.psi[h])[: min(4, self.rho // 2)]
        chosen = [self.memory[h] for h in order]
        self.gradients += len(chosen)
        self.memory, self.psi = [], []
        return chosen


@pytest.mark.parametrize("rho", [2, 5, 10])
def test_gssgd_equals_numpy(data: Dataset, rho: int) -> None:
    workers = 3
    found = run(data, zeros(), mode="sync", workers=workers, rho=rho, **KEYS)
    team = [Reference(data, i, workers, rho, EPOCHS) for i in range(workers)]
    w, replays = np.zeros((CLASSES, FEATURES)), 0
    for turn in zip(*(one.plan for one in team), strict=True):
        w = w - LR * sum(one.on(w, b)[1] for one, b in zip(team, turn, strict=True)) / workers
        chosen = [one.score(w, b) for one, b in zip(team, turn, strict=True)]
        for i in range(max(map(len, chosen))):
            grads = [one.on(w, own[i])[1] for one, own in zip(team, chosen, strict=True) if i < len(own)]
            w = w - LR * sum(grads) / workers
            replays += 1
    np.testing.assert_allclose(found.parameters[: w.size].reshape(w.shape), w, atol=2e-4)
    gradients = sum(one.gradients for one in team)
    evaluations = sum(one.evaluations for one in team)
    assert 0 < replays <= gradients <= workers * replays
    assert rho == 10 or gradients < workers * replays  # some workers have fewer: they contribute zero
    assert found.result["guided"] == {"rho": rho, "evaluations": evaluations, "gradients": gradients, "replays": replays}
    assert found.result["updates"] == EPOCHS * 96 // 4 // workers + replays
    assert found.result["virtual_seconds"] == found.result["updates"]  # a replay takes a gradient's time, scores none


@pytest.mark.parametrize("rho", [2, 5])
def test_gasgd_equals_numpy(data: Dataset, rho: int) -> None:
    """Equal workers: each pushes once per second, in order; a gradient is of what its worker's last push has read."""
    workers = 3
    found = run(data, zeros(), workers=workers, rho=rho, **{**KEYS, "epochs": 1})
    team = [Reference(data, i, workers, rho, 1) for i in range(workers)]
    w = np.zeros((CLASSES, FEATURES))

    def life(one: Reference) -> Iterator[None]:
        nonlocal w
        for batch in one.plan:
            todo, replay = [batch], False
            while todo:
                grad = one.on(one.copy, todo[0])[1]
                yield  # one second later
                w = w - LR * grad
                one.copy = w
                todo = todo[1:] if replay else one.score(w, batch)
                replay = True

    lives = [life(one) for one in team]
    while lives:
        lives = [one for one in lives if next(one, "over") != "over"]
    np.testing.assert_allclose(found.parameters[: w.size].reshape(w.shape), w, atol=2e-4)
    gradients = sum(one.gradients for one in team)
    evaluations = sum(one.evaluations for one in team)
    costs = {"rho": rho, "evaluations": evaluations, "gradients": gradients, "replays": gradients}
    assert found.result["guided"] == costs and gradients > 0
    assert found.result["updates"] == 96 // 4 + gradients
    assert sum(rank["samples"] for rank in found.ranks) == 96  # of the ordinary steps, as live


@pytest.mark.parametrize("base", ["sgd", "adagrad"])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_one_worker_is_the_live_optimizer(data: Dataset, mode: str, base: str) -> None:
    keys = {**KEYS, "base": base, "lr": 0.1, "rho": 5}
    found = run(data, mlp(), mode=mode, workers=1, **keys)
    model, rule = mlp(), ha.rules.ASGD(base=base, lr=0.1)
    if mode == "async":
        opt: Any = ha.Async(model, rule, world=World())
    else:
        opt = ha.Sync(torch_optimizer(rule, model), model=model, world=World())
    check = verification_batch(data, VERIFICATION, 0)
    guided = Guided(opt, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), check, rho=5)
    batches = ha.data.loader(data, batch=4, seed=0)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for batch in batches:
            guided.step(batch)
    guided.close()
    live = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    sizes = [p.numel() for p in model.parameters()]
    parts = np.split(live, np.cumsum(sizes)[:-1])
    sim = simulation(data, mlp(), workers=1)
    for start, size, part in zip(sim.layout.starts, sim.layout.sizes, parts, strict=True):
        mine = found.parameters[start : start + size]
        if mode == "async":
            np.testing.assert_array_equal(bits(mine), bits(part))  # the same kernels on the same batches
        else:
            np.testing.assert_allclose(mine, part, atol=1e-5)  # torch's own optimizer: other roundings
    costs = {"evaluations": guided.evaluations, "gradients": guided.gradients, "replays": guided.replays}
    assert found.result["guided"] == {"rho": 5, **costs} and guided.gradients > 0
    assert found.result["updates"] == opt.updates


@pytest.mark.parametrize("keys", [{"mode": "sync"}, {"mode": "async"}, {"mode": "async", "free_running": True}], ids=str)
def test_a_memory_that_never_fills_changes_nothing(data: Dataset, keys: dict[str, Any]) -> None:
    setting = {"workers": 4, "compute": "exponential:1.0", "rule": "plain", **keys}
    plain = run(data, **setting)
    endless = run(data, guided=True, rho=10**6, **setting)
    np.testing.assert_array_equal(bits(plain.parameters), bits(endless.parameters))
    assert plain.result["virtual_seconds"] == endless.result["virtual_seconds"]
    assert "guided" not in plain.result and endless.result["guided"]["gradients"] == 0
    guided = run(data, guided=True, rho=3, **setting)
    assert (bits(plain.parameters) != bits(guided.parameters)).any()


SETTINGS: list[dict[str, Any]] = [
    {"mode": "sync", "fail": ("1@4.5",), "join": ("1@9",)},
    {"mode": "async", "staleness": 1, "slow": ("2:3",), "fail": ("1@4.5",), "join": ("1@9",)},
    {"rule": "gsgm"},
    {"rule": "gsgm", "out_of_turn": "discard", "slow": ("1:3",)},
    {"rule": "easgd", "period": 2},
    {"free_running": True, "eval_updates": 7},
    {"schedule": "cosine", "base": "momentum", "rule": "trend-smooth", "naive": True},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_goes_with_the_rest_and_repeats(data: Dataset, keys: dict[str, Any]) -> None:
    setting = {"workers": 4, "compute": "exponential:1.0", "guided": True, "rho": 3, **keys}
    first, second = (run(data, **setting) for _ in range(2))
    np.testing.assert_array_equal(bits(first.parameters), bits(second.parameters))
    assert first.result["guided"] == second.result["guided"] and first.result["guided"]["replays"] > 0
    assert np.isfinite(first.parameters).all() and first.result["train_loss"] < 1.5


def test_buffers_and_training_mode_stay(data: Dataset) -> None:
    """Scores are taken with each worker's own statistics, in evaluation mode."""
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    sim = simulation(data, model, mode="sync", workers=2, guided=True, rho=4, epochs=1)
    sim.run()
    assert model.training
    assert sim.guidance is not None
    counted = int(sim.gradients.buffers[0][2])  # batches that the normalisation has seen
    assert 12 < counted <= 12 + sim.guidance.replays < sim.guidance.evaluations


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--workers", "3", "--guided", "--rho", "6", "--verification", "50", "--model", "logistic", "--epochs", "1", "--json"]
    results = []
    for line in ([*args, "--output", "a"], ["--config", "a/config.toml", "--output", "b", "--json"]):
        assert main(["simulate", *line]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    costs = results[0]["guided"]
    steps = 15  # of each worker
    assert costs["rho"] == 6 and costs["gradients"] == costs["replays"] > 0
    assert costs["evaluations"] == 3 * (steps + steps // 6 * 15 + sum(range(steps % 6)))
    assert results[1]["guided"] == costs and results[1]["test_loss"] == results[0]["test_loss"]
    config = make_simulate_config({"guided": True, "rho": 7})
    assert make_simulate_config(config.keys()) == config


BAD = {
    "rho": (["--guided", "--rho", "1"], "--rho=1: expected a whole number >= 2"),
    "rho without guided": (["--rho", "4"], "--rho belongs to guided SGD"),
    "verification": (["--guided", "--verification", "5000"], "verification set of 5000 samples, but the training data have 1438"),
    "no verification": (["--guided", "--verification", "0"], "--verification=0: expected a whole number >= 1"),
    "kstep": (["--guided", "--mode", "kstep"], "--guided belongs to mode async, sync; the mode is kstep"),
    "hierarchical": (["--guided", "--mode", "hierarchical"], "--guided belongs to mode async, sync; the mode is hierarchical"),
    "dry": (["--guided", "--dry"], "--dry has no gradients to guide"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(["simulate", *argv])
    except SystemExit as stop:
        code = stop.code
    text = " ".join(capsys.readouterr().err.split())
    assert code == 2 and text.count("error:") == 1 and words in text
    assert not list(tmp_path.glob("runs/*"))


def test_bad_rho_in_a_script(data: Dataset) -> None:
    with pytest.raises(UsageError, match="--rho=1: expected a whole number >= 2"):
        make_simulate_config({"guided": True, "rho": 1})
