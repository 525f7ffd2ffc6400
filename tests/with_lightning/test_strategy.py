"""The strategy on one rank, and what it refuses."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

import hpcasync as ha
from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.lightning.embed import KEY
from tests.with_lightning.nets import QUIET, Net, batches, same

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


def strategy(mode: str = "sync", **options: Any) -> Any:
    return ha.lightning.HPCAsyncStrategy(mode, world=World(), **options)


def fit(module: L.LightningModule, how: Any, folder: Path, **options: Any) -> L.Trainer:
    at = options.pop("ckpt_path", None)
    given = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, **options}
    trainer = L.Trainer(strategy=how, default_root_dir=folder, **QUIET, **given)
    trainer.fit(module, batches(False), ckpt_path=at)
    return trainer


def lbfgs(module: Any) -> Any:
    return torch.optim.LBFGS(module.parameters(), max_iter=3)


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_one_rank_of_sync_is_lightning_alone(tmp_path: Path, optimizer: str) -> None:
    module = Net(**({"optimizer": lbfgs} if optimizer == "lbfgs" else {}))
    alone = copy.deepcopy(module)
    fit(alone, "auto", tmp_path, limit_train_batches=4)
    fit(module, strategy(), tmp_path, limit_train_batches=4)
    assert same(alone, module)


def test_one_rank_of_async_is_close_to_lightning_alone(tmp_path: Path) -> None:
    module = Net()
    alone = copy.deepcopy(module)
    fit(alone, "auto", tmp_path)
    mode = fit(module, strategy("async"), tmp_path).strategy.optimizer
    torch.testing.assert_close(dict(module.state_dict()), dict(alone.state_dict()), rtol=1e-5, atol=1e-6)
    assert mode.rule.base == "momentum" and mode.updates == 16
    mode.close()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(tmp_path: Path, precision: Any) -> None:
    mode = fit(Net(), strategy("kstep", every=2), tmp_path, precision=precision, limit_train_batches=2).strategy.optimizer
    assert mode.updates == 2
    with pytest.raises(UsageError, match=r"float64, mode async takes float32"):
        fit(Net(), strategy("async"), tmp_path, precision="64-true")


def test_checkpoints_of_other_strategies(tmp_path: Path) -> None:
    """A run of Lightning alone goes on in mode sync with the optimizer's state, and the other way round."""
    module, path = Net(), tmp_path / "one.ckpt"
    fit(module, "auto", tmp_path).save_checkpoint(path)
    on, alone = Net(), Net()
    mode = fit(on, strategy(), tmp_path, max_epochs=2, ckpt_path=path).strategy.optimizer
    assert mode.updates == 16 and mode.inner.param_groups is mode.param_groups
    fit(alone, "auto", tmp_path, max_epochs=2, ckpt_path=path)
    assert same(on, alone)

    for how in (strategy("async"), strategy("sync", rule="trend-smooth")):
        with pytest.raises(UsageError, match=r"another strategy wrote it\. This optimizer can take its weights only"):
            fit(Net(), how, tmp_path, max_epochs=2, ckpt_path=path)

    ours = tmp_path / "ours.ckpt"
    fit(on, strategy(), tmp_path).save_checkpoint(ours)
    assert KEY in torch.load(ours, weights_only=True)
    fit(alone, "auto", tmp_path, max_epochs=2, ckpt_path=ours)
    with pytest.raises(UsageError, match="is of mode 'sync', this is mode 'kstep'"):
        fit(Net(), strategy("kstep"), tmp_path, max_epochs=2, ckpt_path=ours)

    damaged = torch.load(ours, weights_only=True)
    damaged[KEY][700] ^= 1
    torch.save(damaged, ours)
    with pytest.raises(UsageError, match="checksum is wrong"):
        fit(Net(), strategy(), tmp_path, max_epochs=2, ckpt_path=ours)


def test_rule_in_a_synchronous_mode(tmp_path: Path) -> None:
    trainer = fit(Net(), strategy("kstep", every=4, rule="trend-smooth", rule_options={"floor": 0.5}), tmp_path)
    mode = trainer.strategy.optimizer
    assert mode.inner.rule.floor == 0.5 and mode.inner.rule.base == "momentum"
    assert mode.param_groups[0]["lr"] == trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] < 0.05


class Two(Net):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD([self.frozen], lr=0.1)]


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize(
    ("module", "how", "options", "says"),
    [
        (Two, {}, {}, "gave SGD, SGD: expected one torch optimizer"),
        (NoOptimizer, {}, {}, "gave no optimizer: expected one torch optimizer"),
        (Net, {}, {"sync_batchnorm": True}, "needs torch.distributed; leave it out"),
        (Net, {}, {"num_nodes": 3}, r"num_nodes=3\): mpiexec started ranks on 1"),
        (
            Net, {}, {"callbacks": [OnExceptionCheckpoint(".")], "enable_checkpointing": True},
            "OnExceptionCheckpoint: a checkpoint on an exception",
        ),
        (
            Net, {}, {"callbacks": [ModelCheckpoint(".", save_on_exception=True)], "enable_checkpointing": True},
            "ModelCheckpoint: a checkpoint on an exception",
        ),
        (lambda: Net(lbfgs), {"mode": "async"}, {}, "no rule has the step of LBFGS"),
        (Net, {"mode": "async", "rule": "gsmg"}, {}, "did you mean 'gsgm'"),
        (Net, {"mode": "async", "rule_options": {"lr": 0.1}}, {}, r"rule_options has lr, which the optimizer says \(SGD:"),
    ],
)  # fmt: skip
def test_refused_at_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, how: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes on_exception.ckpt into OnExceptionCheckpoint(".")
    with pytest.raises(UsageError, match=says):
        fit(module(), strategy(**how), tmp_path, **options)


@pytest.mark.parametrize(
    ("mode", "options", "says"),
    [
        ("asynch", {}, "unknown mode 'asynch'; did you mean 'async'"),
        ("sync", {"staleness": 3}, r"mode 'sync' has no option 'staleness'. It has: bucket_mb, collectives, on_nonfinite"),
        ("async", {"every": 3}, r"mode 'async' has no option 'every'. It has: staleness"),
    ],
)
def test_refused_at_once(mode: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        strategy(mode, **options)


def test_collectives_of_one_rank_and_refusals() -> None:
    one = strategy()
    assert one.reduce(torch.tensor(3.0)) == 3 and one.reduce("text") == "text"
    assert one.broadcast({"a": 1}) == {"a": 1}
    assert one.all_gather(torch.arange(3)).tolist() == [0, 1, 2]
    assert one.reduce(torch.tensor([1, 2]), reduce_op="sum").tolist() == [1, 2]
    with pytest.raises(UsageError, match="reduce_op='median'"):
        one.reduce(torch.tensor(3.0), reduce_op="median")
    with pytest.raises(UsageError, match="sync_grads=True"):
        one.all_gather(torch.arange(3), sync_grads=True)


def test_lightning_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(UsageError, match=r"needs the package lightning.*pip install 'hpcasync\[lightning\]'"):
        from hpcasync.lightning import HPCAsyncStrategy  # noqa: F401
