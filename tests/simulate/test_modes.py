"""The modes against sequential references, hand-made averages and the live optimizer, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.data import Dataset, Loader
from hpcasync.modes import Async
from hpcasync.simulate.simulation import Place
from hpcasync.store import LocalStore, make_layout
from tests.simulate.toys import bits, mlp, run, simulation

MODES = {
    "async": {"mode": "async", "rule": "trend-smooth"},
    "bounded": {"mode": "async", "staleness": 1, "slow": ("0:3",)},
    "free": {"mode": "async", "free_running": True, "slow": ("0:3",)},
    "sync": {"mode": "sync", "rule": "plain", "base": "adam", "lr": 0.01},
    "kstep": {"mode": "kstep", "rule": "plain", "every": 3, "block_momentum": 0.5},
    "hierarchical": {"mode": "hierarchical", "groups": 2, "every": 3},
}


def batches(data: Dataset, workers: int, epoch: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per worker, the batches of a live loader."""
    loaders = [Loader(data, Place(i, workers), batch=4) for i in range(workers)]
    for loader in loaders:
        loader.set_epoch(epoch)
    return [list(loader) for loader in loaders]


def gradient(w: np.ndarray, batch: tuple[torch.Tensor, torch.Tensor]) -> list[np.ndarray]:
    """Of the toy model at the flat parameters ``w``."""
    model = mlp()
    params = list(model.parameters())
    layout = make_layout([p.numel() for p in params])
    for p, start in zip(params, layout.starts, strict=True):
        p.data = torch.from_numpy(w[start : start + p.numel()].copy()).view(p.shape)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return [p.grad.reshape(-1).numpy() for p in params]  # type: ignore[union-attr]


def flat_start() -> np.ndarray:
    params = list(mlp().parameters())
    layout = make_layout([p.numel() for p in params])
    w = np.zeros(layout.total, np.float32)
    for p, start in zip(params, layout.starts, strict=True):
        w[start : start + p.numel()] = p.detach().reshape(-1).numpy()
    return w


def stores(count: int, rule: rules.Rule, workers: int) -> list[LocalStore]:
    made = [LocalStore(make_layout([p.numel() for p in mlp().parameters()]), rule, workers=workers) for _ in range(count)]
    for store in made:
        store.start_state(flat_start())
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("naive", [False, True])
def test_the_same_bits_for_a_seed_and_others_for_another(data: Dataset, mode: str, naive: bool) -> None:
    keys = {**MODES[mode], "workers": 4, "compute": "exponential:1.0", "network": "1ms,1GB/s", "naive": naive}
    first, second = (run(data, **keys) for _ in range(2))
    np.testing.assert_array_equal(bits(first.parameters), bits(second.parameters))
    assert first.curve == second.curve
    assert [r["staleness"].tolist() for r in first.ranks] == [r["staleness"].tolist() for r in second.ranks]
    other = run(data, **keys, seed=1)
    assert (bits(first.parameters) != bits(other.parameters)).any()
    assert first.result["virtual_seconds"] != other.result["virtual_seconds"]


@pytest.mark.parametrize("mode", MODES)
def test_batched_is_naive_up_to_rounding(data: Dataset, mode: str) -> None:
    keys = {**MODES[mode], "workers": 5, "compute": "gamma:1.0,4"}
    batched, naive = run(data, **keys), run(data, **keys, naive=True)
    assert batched.result["gradients"] == {"lane": "compiled", "threads": torch.get_num_threads()}
    assert naive.result["gradients"] == {"lane": "naive", "threads": 1}
    np.testing.assert_allclose(batched.parameters, naive.parameters, rtol=1e-3, atol=1e-5)
    assert batched.result["virtual_seconds"] == naive.result["virtual_seconds"]
    assert batched.result["staleness"] == naive.result["staleness"]
    assert batched.result["train_loss"] == pytest.approx(naive.result["train_loss"], rel=1e-4)


def test_round_robin_equals_the_sequential_reference(data: Dataset) -> None:
    """Constant step times and no network: the workers take turns."""
    workers, rule = 3, rules.TrendSmooth(base="momentum", lr=0.05)
    found = run(data, workers=workers, epochs=1, rule="trend-smooth", base="momentum", lr=0.05, naive=True)
    (store,) = stores(1, rule, workers)
    views = [store.worker(i) for i in range(workers)]
    copies = [flat_start() for _ in range(workers)]
    hypers = [rule.hyper(rule.group_options())] * len(store.layout.sizes)
    for turn in zip(*batches(data, workers), strict=True):
        for view, copy, batch in zip(views, copies, turn, strict=True):
            store.push_pull(view, gradient(copy, batch), copy, hypers)
    np.testing.assert_array_equal(bits(found.parameters), bits(store.state[0]))
    assert found.result["virtual_seconds"] == len(batches(data, workers)[0])
    for i, rank in enumerate(found.ranks):
        assert rank["staleness"][: workers + 1].tolist() == views[i].staleness.counts[: workers + 1].tolist()


@pytest.mark.parametrize("rule", ["asgd", "trend-smooth"])
def test_one_worker_equals_the_live_mode_at_one_rank(data: Dataset, rule: str) -> None:
    found = run(data, workers=1, rule=rule, base="adam", lr=0.01)
    model = mlp()
    opt = Async(model, rules.make_rule(rule, {"base": "adam", "lr": 0.01}), world=World())
    for epoch in range(2):
        for x, y in batches(data, 1, epoch)[0]:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        opt.synchronize()
    np.testing.assert_array_equal(bits(found.parameters), bits(opt.store.state[0]))
    opt.close()
    assert found.result["updates"] == 48 and found.result["samples_per_second"] == pytest.approx(192 / 48)


def test_sync_applies_the_mean_gradient(data: Dataset) -> None:
    workers = 4
    found = run(data, mode="sync", workers=workers, epochs=1, rule="plain", lr=0.1, naive=True, compute="exponential:1.0")
    w = flat_start()
    (store,) = stores(1, rules.ASGD(lr=0.1), 1)
    hypers = [store.rule.hyper(store.rule.group_options())] * len(store.layout.sizes)
    view = store.worker(0)
    steps = list(zip(*batches(data, workers), strict=True))
    for turn in steps:
        parts = [gradient(w, batch) for batch in turn]
        mean = [sum(ps[1:], ps[0].copy()) / np.float32(workers) for ps in zip(*parts, strict=True)]
        store.push_pull(view, mean, w, hypers)
    np.testing.assert_array_equal(bits(found.parameters), bits(w))
    assert found.result["updates"] == len(steps) and found.result["staleness"]["max"] == 0
    for rank in found.ranks:  # the slowest sets the pace
        assert rank["compute"] + rank["wait"] == pytest.approx(found.result["virtual_seconds"])


@pytest.mark.parametrize("mu, nesterov", [(0.0, False), (0.5, False), (0.5, True)])
def test_kstep_is_local_steps_and_averages(data: Dataset, mu: float, nesterov: bool) -> None:
    workers, every = 3, 3
    keys = {"mode": "kstep", "rule": "plain", "lr": 0.1, "every": every, "block_momentum": mu, "nesterov": nesterov}
    found = run(data, workers=workers, epochs=1, naive=True, slow=("1:2",), **keys)
    rule = rules.ASGD(lr=0.1)
    made = stores(workers, rule, 1)
    views = [s.worker(0) for s in made]
    copies = [flat_start() for _ in range(workers)]
    hypers = [rule.hyper(rule.group_options())] * len(made[0].layout.sizes)
    anchor, velocity = flat_start(), np.zeros(made[0].layout.total, np.float32)
    steps = list(zip(*batches(data, workers), strict=True))
    for number, turn in enumerate(steps, start=1):
        for store, view, copy, batch in zip(made, views, copies, turn, strict=True):
            store.push_pull(view, gradient(copy, batch), copy, hypers)
        if number % every == 0 or number == len(steps):
            d = np.mean([s.state[0] for s in made], axis=0) - anchor
            velocity = mu * velocity + d
            anchor = anchor + (d + mu * velocity if nesterov else velocity)
            for store, view, copy in zip(made, views, copies, strict=True):
                store.state[0] = anchor
                store.pull(view, copy)
    np.testing.assert_allclose(found.parameters, anchor, rtol=1e-4, atol=1e-6)
    assert found.result["virtual_seconds"] == 2 * len(steps)  # all wait for the slow one
    assert found.result["updates"] == workers * len(steps)


def test_hierarchical_groups_are_stale_inside_and_meet_every_k(data: Dataset) -> None:
    found = run(data, mode="hierarchical", workers=4, groups=2, every=3, network="1s,inf", rule="asgd")
    assert found.result["nodes"] == 2
    # In a block each worker pushes 3 times; between two of its pushes comes one of the other.
    assert found.result["staleness"]["max"] == 1
    steps = 96 // 4 // 4
    blocks = 2 * steps // 3
    assert found.result["virtual_seconds"] == pytest.approx(blocks * (3 * (1 + 2) + 2))  # an average: two messages of 1 s


@pytest.mark.parametrize("network", ["0,inf", "5s,inf"])
def test_an_average_that_goes_on_while_all_compute(data: Dataset, network: str) -> None:
    """Groups of one worker are deterministic: what is sent after 4 steps comes back as a correction 2 steps later."""
    mu, every, delay = 0.5, 4, 2
    keys = {"mode": "hierarchical", "workers": 2, "groups": 2, "batch": 4, "every": every, "delay": delay, "block_momentum": mu}
    found = run(data, **keys, rule="asgd", base="sgd", lr=0.1, epochs=1, network=network)
    work = batches(data, 2)
    assert len(work[0]) == 12
    w = np.stack([flat_start()] * 2).astype(np.float64)
    anchor, velocity, sent = w[0].copy(), np.zeros_like(w[0]), None
    layout = make_layout([p.numel() for p in mlp().parameters()])
    for step in range(12):
        for i in range(2):
            for start, g in zip(layout.starts, gradient(w[i].astype(np.float32), work[i][step]), strict=True):
                w[i, start : start + g.size] -= 0.1 * g
        if sent is not None and (step + 1) % every == delay:
            velocity = mu * velocity + sent.mean(axis=0) - anchor
            anchor = anchor + velocity
            w, sent = w + anchor - sent, None
        if (step + 1) % every == 0:
            sent = w.copy()
    assert sent is not None
    for late in (sent, None):  # at the end of the epoch what is under way is put in, then all average once more
        velocity = mu * velocity + (w if late is None else late).mean(axis=0) - anchor
        anchor = anchor + velocity
        w = w + anchor - late if late is not None else np.stack([anchor, anchor])
    np.testing.assert_allclose(found.parameters, w[0], rtol=2e-4, atol=1e-6)
    assert found.result["virtual_seconds"] >= 12


def test_a_late_sum_holds_up_the_first_worker_of_a_group(data: Dataset) -> None:
    keys = {"mode": "hierarchical", "workers": 4, "groups": 2, "every": 4, "rule": "asgd", "epochs": 1}
    waits = run(data, **keys, slow=("3:1.5",))
    goes_on = run(data, **keys, slow=("3:1.5",), delay=2)
    assert goes_on.result["virtual_seconds"] <= waits.result["virtual_seconds"]
    again = run(data, **keys, slow=("3:1.5",), delay=2)
    np.testing.assert_array_equal(bits(goes_on.parameters), bits(again.parameters))
    failing = run(data, **keys, delay=2, fail=("0@3.5", "2@5.5"))  # the first workers of both groups
    assert np.isfinite(failing.parameters).all()
    alone = run(data, **keys, delay=2, fail=("2@3.5", "3@3.5"))  # a whole group
    assert np.isfinite(alone.parameters).all()


def test_evaluations_between_and_free_running(data: Dataset) -> None:
    found = run(data, workers=4, free_running=True, slow=("0:8",))
    assert [row["epoch"] for row in found.curve] == [1, 2]
    assert found.result["updates"] == 2 * 24
    assert found.ranks[0]["updates"] < found.ranks[1]["updates"]
    between = run(data, workers=4, eval_updates=8)
    assert [round(row["epoch"], 3) for row in between.curve] == [0.333, 0.667, 1, 1, 1.333, 1.667, 2, 2]


def test_scripted_schedule_has_the_expected_staleness(data: Dataset) -> None:
    """Worker 0 takes 1 s, worker 1 takes 2.5 s: pushes at 1, 2, 2.5, 3, 4, 5 (0 before 1), 5, ..."""
    sim = simulation(data, workers=2, slow=("1:2.5",), epochs=1)
    seen: list[tuple[float, int, int]] = []
    for worker in sim.workers:
        worker.view.observer = lambda k, read, wrote, i=worker.index: seen.append((sim.now, i, wrote - 1 - read))
    sim.run()
    assert seen[:8] == [(1, 0, 0), (2, 0, 0), (2.5, 1, 2), (3, 0, 1), (4, 0, 0), (5, 0, 0), (5, 1, 3), (6, 0, 1)]


def test_gate_keeps_the_bound(data: Dataset) -> None:
    sim = simulation(data, workers=3, slow=("2:5",), staleness=2, epochs=1)
    ahead: list[int] = []
    store = sim.stores[0]
    for worker in sim.workers:
        worker.view.observer = lambda k, r, w, i=worker.index: ahead.append(int(store.clocks[i] - store.clocks.min()))
    sim.run()
    assert max(ahead) == 2  # at a push; none begins another when it is 3 ahead
    assert sim.now == 5 * sim.steps_per_epoch
    assert sim.workers[0].record(sim.now)["wait"] > 0


def test_partition_and_schedule(data: Dataset) -> None:
    found = run(data, workers=3, partition="shards:1", schedule="cosine", epochs=1)
    assert np.isfinite(found.parameters).all()
    assert (bits(found.parameters) != bits(run(data, workers=3, epochs=1).parameters)).any()
