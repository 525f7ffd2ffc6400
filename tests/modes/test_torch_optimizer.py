"""The three modes are torch optimizers: groups, schedulers, closures, state, hooks. One rank, no MPI."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpcasync import rules
from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.modes import Async, KStep, Sync
from tests.modes.toys import MODES, batch, flat, make, mlp, set_grads, train

ONE = World()


def plain(mode: str, groups: Any, lr: float = 0.5, **options: Any) -> Any:
    """The mode around plain SGD: a gradient of 1 moves every parameter by -lr."""
    if mode == "async":
        return Async(groups, rules.ASGD(lr=lr), world=ONE, **options)
    inner = torch.optim.SGD(groups.parameters() if isinstance(groups, nn.Module) else groups, lr=lr)
    return (
        Sync(inner, world=ONE, **options) if mode == "sync" else KStep(inner, world=ONE, every=2, **options)
    )


def torch_twin(optimizer: type, model: nn.Module, **options: Any) -> Any:
    return optimizer(model.parameters(), **options)


@pytest.mark.parametrize("mode", MODES)
def test_groups_with_their_own_rates(mode: str) -> None:
    model = mlp()
    first, rest = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    opt = plain(mode, [{"params": first, "lr": 0.25}, {"params": iter(rest)}])
    assert isinstance(opt, torch.optim.Optimizer)
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.5]
    before = [p.detach().clone() for p in [*first, *rest]]
    set_grads(model, 1.0)
    opt.step()
    opt.param_groups[0]["lr"] = 4.0
    set_grads(model, 1.0)
    opt.step()
    for i, (p, old) in enumerate(zip([*first, *rest], before)):
        moved = 4.25 if i < len(first) else 1.0
        torch.testing.assert_close(p.detach(), old - moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_tensor_as_a_group(mode: str) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    opt = plain(mode, [{"params": weight}])
    weight.grad = torch.ones(3, 2)
    opt.step()
    assert (weight == 0.5).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, options",
    [
        ("StepLR", dict(step_size=2, gamma=0.5)),
        ("OneCycleLR", dict(max_lr=0.5, total_steps=12)),
        ("CosineAnnealingLR", dict(T_max=6)),
        ("LinearLR", dict(start_factor=0.1, total_iters=4)),
    ],
)
def test_schedulers_reach_the_step(mode: str, name: str, options: dict[str, Any], recwarn: Any) -> None:
    """Momentum SGD under the scheduler is torch's, OneCycleLR's cycling momentum included."""
    model, twin = mlp(), mlp()
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    if mode == "async":
        opt: Any = Async(model, rules.ASGD(base="momentum", lr=0.1), world=ONE)
    else:
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = Sync(inner, world=ONE) if mode == "sync" else KStep(inner, world=ONE, every=4)
    schedules = [getattr(torch.optim.lr_scheduler, name)(o, **options) for o in (opt, reference)]
    rates = []
    for step in range(10):
        for o, m in ((opt, model), (reference, twin)):
            x, y = batch(step)
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
        for schedule in schedules:
            schedule.step()
        rates.append(opt.param_groups[0]["lr"])
        assert opt.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert len(set(rates)) > 3
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@pytest.mark.parametrize("mode", MODES)
def test_closure(mode: str) -> None:
    model, twin = mlp(), mlp()
    opt, other = make(mode, model, ONE), make(mode, twin, ONE)
    for step in range(5):
        x, y = batch(step)

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)  # noqa: B023
            loss.backward()
            return loss

        expected = F.cross_entropy(model(x), y).item()
        with torch.no_grad():
            loss = opt.step(closure)
        assert loss.item() == expected
    train(other, twin, range(5))
    np.testing.assert_array_equal(flat(model), flat(twin))
    assert opt.steps == opt.updates == 5


def test_lbfgs_inside_sync() -> None:
    model, twin = nn.Linear(6, 3), nn.Linear(6, 3)
    twin.load_state_dict(model.state_dict())
    x, y = batch(0, size=64)
    losses = []
    for m, wrap in ((model, lambda o: Sync(o, world=ONE)), (twin, lambda o: o)):
        opt = wrap(torch.optim.LBFGS(m.parameters(), line_search_fn="strong_wolfe", max_iter=5))

        def closure() -> torch.Tensor:
            opt.zero_grad()  # noqa: B023
            loss = F.cross_entropy(m(x), y)  # noqa: B023
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(4)])
    assert losses[0] == losses[1] and losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("mode", MODES)
def test_saved_and_loaded_is_as_never_stopped(mode: str, steps: int, tmp_path: Path) -> None:
    """Also in the middle of a block (4 steps, K = 3): bit for bit."""
    whole, half = mlp(), mlp()
    opt = make(mode, whole, ONE)
    train(opt, whole, range(2 * steps))
    opt = make(mode, half, ONE)
    train(opt, half, range(steps))
    torch.save({"model": half.state_dict(), "opt": opt.state_dict()}, tmp_path / "c.pt")
    opt.close()
    fresh = mlp(seed=7)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    opt = make(mode, fresh, ONE, lr=99.0)
    fresh.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert opt.param_groups[0]["lr"] == 0.05
    train(opt, fresh, range(steps, 2 * steps))
    np.testing.assert_array_equal(flat(fresh), flat(whole))
    assert opt.steps == 2 * steps and opt.updates == 2 * steps


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_a_copy(mode: str) -> None:
    model = mlp()
    opt = make(mode, model, ONE)
    train(opt, model, range(4))
    saved = copy.deepcopy(opt.state_dict())
    kept = io.BytesIO()
    torch.save(opt.state_dict(), kept)
    state = opt.state_dict()
    train(opt, model, range(4, 8))
    if mode == "async":  # the others follow torch, whose state_dict refers to the live tensors
        for i, vectors in saved["state"].items():
            for name, value in vectors.items():
                assert torch.equal(value, state["state"][i][name]), (i, name)


@pytest.mark.parametrize("mode", MODES)
def test_state_of_another_mode_rule_or_model_is_refused(mode: str) -> None:
    opt = make(mode, mlp(), ONE)
    for other in (m for m in MODES if m != mode):
        with pytest.raises(UsageError, match="the state is of"):
            opt.load_state_dict(make(other, mlp(), ONE).state_dict())
    if mode == "async":
        with pytest.raises(UsageError, match="adam"):
            opt.load_state_dict(Async(mlp(), rules.ASGD(base="adam"), world=ONE).state_dict())
        wider = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
        with pytest.raises(UsageError, match=r"0\.weight.*momentum_buffer"):
            opt.load_state_dict(make(mode, wider, ONE).state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_stay_and_can_be_unfrozen(mode: str) -> None:
    model, twin = mlp(), mlp()
    model[2].requires_grad_(False)
    opt = make(mode, model, ONE)
    before = flat(model[2])
    train(opt, model, range(5))
    np.testing.assert_array_equal(flat(model[2]), before)
    assert (flat(model[0]) != flat(twin[0])).any()
    model[2].requires_grad_(True)
    train(opt, model, range(5, 11))
    assert (flat(model[2]) != before).mean() > 0.9
    model[0].requires_grad_(False)
    before = flat(model[0])
    train(opt, model, range(11, 14))
    np.testing.assert_array_equal(flat(model[0]), before)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_without_gradient_in_some_steps(mode: str) -> None:
    model = mlp()
    opt = plain(mode, model)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(4):
        opt.zero_grad()
        for i, p in enumerate(model.parameters()):
            if (step + i) % 2:
                p.grad = torch.ones_like(p)
        opt.step()
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old - 1.0, rtol=0, atol=1e-6)
    opt.zero_grad()
    opt.step()  # none at all
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old - 1.0, rtol=0, atol=1e-6)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 6)
        self.out = nn.Linear(6, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.embed(x)))


@pytest.mark.parametrize("mode", MODES)
def test_tied_weights(mode: str) -> None:
    model, twin = Tied(), Tied()
    opt, reference = plain(mode, model), torch.optim.SGD(twin.parameters(), lr=0.5)
    x = torch.tensor([0, 1, 2, 3, 4])
    for m, o in ((model, opt), (twin, reference)):
        for _ in range(4):
            o.zero_grad()
            F.cross_entropy(m(x), (x + 1) % 5).backward()
            o.step()
    assert model.out.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight, twin.embed.weight)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_zero_grad(mode: str, set_to_none: bool) -> None:
    model, twin = mlp(), mlp()
    opt, other = make(mode, model, ONE), make(mode, twin, ONE)
    for step in range(6):
        x, y = batch(step)
        opt.zero_grad(set_to_none)
        grads = [p.grad for p in model.parameters()]
        assert all(g is None if set_to_none else g is None or not g.any() for g in grads)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    train(other, twin, range(6))
    np.testing.assert_array_equal(flat(model), flat(twin))


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_the_model_are_independent(mode: str) -> None:
    model = mlp()
    opt = make(mode, model, ONE)
    train(opt, model, range(2))
    kept, twin, file = flat(model), copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), file)
    train(opt, model, range(2, 5))
    assert (flat(model) != kept).any()
    np.testing.assert_array_equal(flat(twin), kept)
    file.seek(0)
    loaded = mlp(seed=3)
    loaded.load_state_dict(torch.load(file))
    np.testing.assert_array_equal(flat(loaded), kept)
    before = flat(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    np.testing.assert_array_equal(flat(model), before)
    with pytest.raises(TypeError, match="copy the model"):
        copy.deepcopy(opt)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_loading_into_the_model_is_noticed(mode: str, replace: bool) -> None:
    """Also where the load replaces the storage of the parameters."""
    model, source = mlp(), mlp(seed=5)
    opt = plain(mode, model)
    if replace:
        for p, q in zip(model.parameters(), source.parameters()):
            p.data = q.detach().clone()
    else:
        model.load_state_dict(source.state_dict())
    np.testing.assert_array_equal(flat(model), flat(source))
    for m in (model, source):
        set_grads(m, 1.0)
    opt.step()
    torch.optim.SGD(source.parameters(), lr=0.5).step()
    np.testing.assert_array_equal(flat(model), flat(source))


@pytest.mark.parametrize("mode", MODES)
def test_converting_the_model_afterwards_is_a_clear_error(mode: str) -> None:
    model = mlp()
    opt = make(mode, model, ONE)
    model.to(torch.float64)
    x, y = batch(0)
    with pytest.raises(UsageError, match=r"float64.*Convert the model first"):
        for _ in range(4):
            F.cross_entropy(model(x.double()), y).backward()
            opt.step()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_train(mode: str) -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        plain(mode, model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(mode: str, dtype: torch.dtype) -> None:
    model = mlp()
    model[2].to(dtype)
    if dtype == torch.float64 and mode != "async":
        opt = plain(mode, model)
        before = [p.detach().clone() for p in model.parameters()]
        set_grads(model, 1.0)
        opt.step()
        opt.synchronize()
        for p, old in zip(model.parameters(), before):
            assert p.dtype == old.dtype
            torch.testing.assert_close(p.detach(), old - 0.5, rtol=0, atol=1e-6)
        return
    with pytest.raises(UsageError, match=f"{str(dtype)[6:]}, mode {mode} takes float32"):
        plain(mode, model)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_sparse_gradient_is_refused(mode: str) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    opt = plain(mode, model)
    with pytest.raises(UsageError, match="sparse gradient"):
        model(torch.tensor([1, 2])).sum().backward()
        opt.step()


def test_sparse_gradient_inside_kstep() -> None:
    """The local step is the wrapped optimizer's own: what it takes is fine."""
    model = nn.Embedding(5, 3, sparse=True)
    opt = plain("kstep", model)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    opt.step()
    assert ((model.weight - before).abs().sum(1) > 0).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_gradient_is_skipped(mode: str, with_closure: bool) -> None:
    model = mlp()
    opt = make(mode, model, ONE, every=99) if mode == "kstep" else make(mode, model, ONE)
    train(opt, model, range(3))
    before = flat(model)

    def bad() -> torch.Tensor:
        opt.zero_grad()
        set_grads(model, 1.0)
        next(iter(model.parameters())).grad[0, 0] = float("nan")  # type: ignore[index]
        return torch.tensor(float("nan"))

    with pytest.warns(RuntimeWarning, match=r"rank 0, step 4: NaN or infinity"):
        if with_closure:
            opt.step(bad)
        else:
            bad()
            opt.step()
    np.testing.assert_array_equal(flat(model), before)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad()
        opt.step()
    assert (opt.steps, opt.updates, opt.skipped) == (5, 3, 2)
    train(opt, model, range(3, 6))
    assert (flat(model) != before).any() and np.isfinite(flat(model).view(np.float32)).all()
    assert (opt.steps, opt.updates, opt.skipped) == (8, 6, 2)


@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_gradient_aborts(mode: str) -> None:
    model = mlp()
    opt = make(mode, model, ONE, on_nonfinite="abort")
    set_grads(model, float("inf"))
    with pytest.raises(FloatingPointError, match="rank 0, step 1"):
        opt.step()
    with pytest.raises(UsageError, match="did you mean 'abort'"):
        make(mode, mlp(), ONE, on_nonfinite="aborts")


@pytest.mark.parametrize("mode", MODES)
def test_step_hooks_and_added_groups(mode: str) -> None:
    model = mlp()
    opt, calls = make(mode, model, ONE), []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    train(opt, model, range(1))
    assert calls == ["pre", "post"]
    with pytest.raises(UsageError, match="add_param_group"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("mode", MODES)
def test_context_manager_and_close(mode: str) -> None:
    model = mlp()
    with make(mode, model, ONE) as opt:
        train(opt, model, range(4))
        opt.synchronize()
    before = flat(model)
    opt.close()
    opt.close()
    np.testing.assert_array_equal(flat(model), before)
    assert model(batch(0)[0]).isfinite().all()
    assert opt.share.seconds > 0 and sum(opt.share.shares().values()) == pytest.approx(1)
    again = make(mode, model, ONE)  # a second optimizer for the same model
    train(again, model, range(4, 6))
    assert (flat(model) != before).any()
    again.close()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: Async(m, "asgd", world=ONE), "rule='asgd'"),
        (lambda m: Async(m, rules.ASGD(), staleness=-1, world=ONE), "staleness=-1"),
        (lambda m: Async([{"params": m.parameters(), "lr": -1}], rules.ASGD(), world=ONE), "lr=-1"),
        (lambda m: Sync(m, world=ONE), "wraps a torch optimizer.*Sequential"),
        (lambda m: Sync(make("sync", m, ONE), world=ONE), "wraps a torch optimizer.*Sync"),
        (lambda m: make("sync", m, ONE, bucket_mb=0), "bucket_mb=0"),
        (lambda m: make("kstep", m, ONE, every=0), "every=0"),
        (lambda m: make("kstep", m, ONE, every=2.5), "every=2.5"),
        (lambda m: make("kstep", m, ONE, warm_start=-1), "warm_start=-1"),
        (lambda m: make("kstep", m, ONE, block_momentum=1.0), "block_momentum=1.0"),
        (lambda m: make("kstep", m, ONE, block_lr=0), "block_lr=0"),
        (lambda m: make("kstep", m, ONE, inner_state="avarage"), "did you mean 'average'"),
    ],
)
def test_bad_arguments(call: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        call(mlp())


@pytest.mark.parametrize("mode", MODES)
def test_channels_last_model(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(
        memory_format=torch.channels_last
    )
    twin = copy.deepcopy(model)
    opt, reference = plain(mode, model), torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in range(4):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, opt), (twin, reference)):
            o.zero_grad()
            m(x.to(memory_format=torch.channels_last)).square().mean().backward()
            o.step()
        if step == 1:
            model.to(memory_format=torch.channels_last)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)


def test_rule_with_its_own_state_per_group_option() -> None:
    """Every hyper-parameter of the rule can be set per group, also of the trend."""
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    opt = Async(
        [{"params": [a], "floor": 1.0}, {"params": [b]}], rules.TrendSmooth(lr=1.0, floor=0.0), world=ONE
    )
    for grad in (1.0, -1.0):
        a.grad, b.grad = torch.full((4,), grad), torch.full((4,), grad)
        opt.step()
    assert (a == 0).all() and (b < -0.5).all()
