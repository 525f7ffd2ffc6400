"""A real Trainer on two ranks, with each MPI library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mpi import MpiRun

HEAD = """
import copy, json, sys, warnings
from pathlib import Path
import lightning as L, torch
import hpcasync as ha
from tests.with_lightning.nets import QUIET, Net, batches, by_hand, data, same

folder = Path(sys.argv[1])
world = ha.init()
found = {}

def trainer(strategy, **options):
    return L.Trainer(strategy=strategy, default_root_dir=folder, **{**QUIET, "max_epochs": 2, **options})

def net(seed=0, kind=Net, **options):
    torch.manual_seed(seed + 1000 * world.rank)  # ranks begin differently
    return kind(**options)

def equal_on_ranks(module):
    everyone = world.gather({k: v.clone() for k, v in module.state_dict().items()})
    return all(torch.equal(everyone[0][k], theirs[k]) for theirs in everyone for k in everyone[0])

def report():
    Path(sys.argv[1], f"rank{world.rank}.json").write_text(json.dumps(found))
"""


def run(mpirun: MpiRun, folder: Path, code: str, n: int = 2) -> list[dict[str, object]]:
    """What each rank has found."""
    mpirun(HEAD + code + "\nreport()\n", n, args=[folder], timeout=300)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(n)]


@pytest.mark.slow
def test_synchronous_modes_are_a_loop_by_hand(mpirun: MpiRun, tmp_path: Path) -> None:
    found = run(
        mpirun,
        tmp_path,
        """
for name, options, accumulate in (("sync", {}, 2), ("kstep", {"every": 3, "block_momentum": 0.5}, 1)):
    module = net()
    plain = copy.deepcopy(module)
    strategy = ha.lightning.HPCAsyncStrategy(name, **options)
    fit = trainer(strategy, gradient_clip_val=0.3, accumulate_grad_batches=accumulate)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit.fit(module, batches(), batches(False))
    with torch.no_grad():  # as the strategy does: all of rank 0's model, what is frozen too
        plain.frozen.copy_(world.gather(plain.frozen)[0])
    make = {"sync": ha.Sync, "kstep": ha.KStep}[name]
    by_hand(plain, lambda o: make(o, model=plain, **options), epochs=2, clip=0.3, accumulate=accumulate)
    found[name] = {
        "same": same(module, plain),
        "equal": equal_on_ranks(module),
        "steps": fit.global_step,
        "lr": strategy.optimizer.param_groups[0]["lr"],
        "metrics": {k: v.item() for k, v in fit.callback_metrics.items()},
        "updates": strategy.optimizer.updates,
        "alone": sorted({str(w.message).split("'")[1] for w in warned if "share of the validation data alone" in str(w.message)}),
    }
    # What the ranks say of their halves of the data is what one rank says of all of it.
    module.eval()
    with torch.no_grad():
        loss, scores = module.loss(data().tensors)
    found[name]["whole"] = [loss.item(), ((scores > 0) == data().tensors[1]).float().mean().item()]
""",
    )
    for rank in found:
        for name, steps in (("sync", 8), ("kstep", 16)):
            got = rank[name]
            assert isinstance(got, dict)
            assert got["same"] and got["equal"], name
            assert got["steps"] == got["updates"] == steps
            assert got["lr"] < 0.05
            assert got["metrics"]["val_loss"] == pytest.approx(got["whole"][0], rel=1e-5)
            assert got["metrics"]["val_accuracy"] == pytest.approx(got["whole"][1], abs=1e-6)
    for name in ("sync", "kstep"):
        zero, one = found[0][name], found[1][name]
        assert isinstance(zero, dict) and isinstance(one, dict)
        assert zero["alone"] == ["own_loss"] and one["alone"] == []  # said once, by rank 0
        assert zero["metrics"].pop("own_loss") != one["metrics"].pop("own_loss")
        assert zero["metrics"] == one["metrics"]


@pytest.mark.slow
def test_resume(mpirun: MpiRun, tmp_path: Path) -> None:
    """From a checkpoint inside a run: the bits of the run that was not stopped; dropout's random numbers too."""
    found = run(
        mpirun,
        tmp_path,
        """
from lightning.pytorch.callbacks import ModelCheckpoint

def fit(name, options, module, epochs, at=None):
    strategy = ha.lightning.HPCAsyncStrategy(name, **options)
    keep = ModelCheckpoint(folder / name, "{epoch}", monitor="val_loss", save_top_k=-1)
    one = trainer(strategy, callbacks=[keep], max_epochs=epochs)
    one.fit(module, batches(), batches(False), ckpt_path=at)
    return one

class Start(L.Callback):
    def on_train_start(self, trainer, module):
        mode = trainer.strategy.optimizer
        self.found = {k: v.clone() for k, v in module.state_dict().items()}
        self.vectors = copy.deepcopy(mode.state_dict()["state"])
        self.updates, self.lr = mode.updates, mode.param_groups[0]["lr"]
        world.collectives.barrier()  # nobody pushes before all have looked

modes = {
    "sync": {}, "kstep": {"every": 5, "block_momentum": 0.5},
    "async": {"rule": "trend-smooth"}, "hierarchical": {"rule": "asgd", "every": 3, "groups": 2, "block_momentum": 0.5},
}
for name, options in modes.items():
    whole = net(dropout=0.3)
    torch.manual_seed(7 + world.rank)
    first = fit(name, options, whole, 2)
    path = folder / name / "epoch=0.ckpt"
    again = net(1, dropout=0.3)
    start = Start()
    torch.manual_seed(99)
    strategy = ha.lightning.HPCAsyncStrategy(name, **options)
    second = trainer(strategy, callbacks=[start], enable_checkpointing=False)
    second.fit(again, batches(), batches(False), ckpt_path=path)
    saved = torch.load(path, weights_only=True)
    vectors = saved["optimizer_states"][0]["state"]
    found[name] = {
        "same": same(whole, again), "equal": equal_on_ranks(again), "steps": second.global_step,
        "files": sorted(p.name for p in (folder / name).iterdir()),
        "loaded": all(torch.equal(start.found[k], v) for k, v in saved["state_dict"].items()),
        "vectors": all(torch.equal(start.vectors[i][k], v) for i in vectors for k, v in vectors[i].items() if k != "step"),
        "named": sorted(list(vectors.values())[-1]), "updates": start.updates, "lr": start.lr,
    }

# A checkpoint after the fit has all that a later fit needs, and a model that any other strategy takes.
module = net()
strategy = ha.lightning.HPCAsyncStrategy("async", staleness=4)
one = trainer(strategy, enable_checkpointing=False)
one.fit(module, batches(), batches(False))
one.save_checkpoint(folder / "after.ckpt")
longer = trainer(ha.lightning.HPCAsyncStrategy("async", staleness=4), max_epochs=3, enable_checkpointing=False)
longer.fit(net(3), batches(), batches(False), ckpt_path=folder / "after.ckpt")
found["after"] = [longer.global_step, longer.strategy.optimizer.updates]
""",
    )
    for r, rank in enumerate(found):
        for name in ("sync", "kstep", "async", "hierarchical"):
            got = rank[name]
            assert isinstance(got, dict)
            assert got["files"] == ["epoch=0.ckpt", "epoch=1.ckpt"]
            assert got["loaded"] and got["equal"], name
            assert got["vectors"] or r, name  # torch's own part of the file is rank 0's
            assert got["steps"] == 16 and got["updates"] == 8
            assert got["lr"] < 0.05
            assert "momentum_buffer" in got["named"]
        assert rank["sync"]["same"] and rank["kstep"]["same"] and rank["hierarchical"]["same"]  # type: ignore[index]
        assert rank["after"] == [24, 24]


@pytest.mark.slow
def test_asynchronous_modes(mpirun: MpiRun, tmp_path: Path) -> None:
    found = run(
        mpirun,
        tmp_path,
        """
rules = {"trend-smooth": {"rule_options": {"floor": 0.1}, "staleness": 4}, "easgd": {}, "gsgm": {"staleness": 8}, "hogwild": {}}
for rule, options in rules.items():
    module = net()
    strategy = ha.lightning.HPCAsyncStrategy("async", rule=rule, **options)
    fit = trainer(strategy, enable_checkpointing=False, max_epochs=4, gradient_clip_val=1.0, accumulate_grad_batches=2)
    fit.fit(module, batches(), batches(False))
    mode = strategy.optimizer
    found[rule] = {
        "equal": equal_on_ranks(module), "updates": mode.updates, "lr": mode.param_groups[0]["lr"],
        "accuracy": fit.callback_metrics["val_accuracy"].item(),
        "again": fit.validate(module, batches(False), verbose=False)[0]["val_accuracy"],
    }
found["staleness"] = world.gather(len(strategy.optimizer.staleness.counts))

# Manual optimisation, means over the ranks, and a rank with fewer batches.
class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch)[0])
        optimizer.step()
        if index == 0:
            rank = torch.tensor(float(self.global_rank))
            reduce, gather = self.trainer.strategy.reduce, self.all_gather(torch.full((2,), self.global_rank))
            self.seen = [reduce(rank, reduce_op=op).item() for op in ("mean", "sum", "min", "max")] + gather.flatten().tolist()
            self.seen += [self.trainer.strategy.broadcast(f"from {self.global_rank}", src=1)]
            self.seen += [self.trainer.strategy.reduce_boolean_decision(self.global_rank == 1, all=a) for a in (True, False)]

    def train_dataloader(self):
        part = torch.utils.data.Subset(data(), range(48 if self.global_rank else 240))
        return torch.utils.data.DataLoader(part, batch_size=16)

for name in ("async", "sync"):
    strategy = ha.lightning.HPCAsyncStrategy(name, **({"staleness": 2} if name == "async" else {}))
    module = net(kind=Manual)
    fit = trainer(strategy, use_distributed_sampler=False, enable_checkpointing=False, num_sanity_val_steps=0)
    if name == "sync":  # every rank needs as many steps there
        module.train_dataloader = batches
    fit.fit(module, val_dataloaders=batches(False))
    found["manual " + name] = {"seen": module.seen, "equal": equal_on_ranks(module), "steps": fit.global_step}
""",
    )
    for r, rank in enumerate(found):
        for rule in ("trend-smooth", "easgd", "gsgm", "hogwild"):
            got = rank[rule]
            assert isinstance(got, dict)
            assert got["equal"], rule
            assert got["updates"] == 16 or rule == "gsgm"
            assert 0 < got["lr"] < 0.05
            assert got["again"] == pytest.approx(got["accuracy"])
            assert got["accuracy"] > 0.6
        for name, steps in (("async", (30, 6)[r]), ("sync", 32)):
            got = rank["manual " + name]
            assert isinstance(got, dict)
            assert got["seen"] == [0.5, 1.0, 0.0, 1.0, 0, 0, 1, 1, "from 1", False, True]
            assert got["equal"] and got["steps"] == steps


FAILS = """
class Failing(Net):
    def training_step(self, batch, index):
        if self.global_rank == 1 and self.global_step == 3:
            {fail}
        return super().training_step(batch, index)

trainer(ha.lightning.HPCAsyncStrategy({mode!r}), enable_checkpointing=False, max_epochs=20).fit(
    Failing(), batches(), batches(False))
print("fit has ended")
"""


@pytest.mark.slow
@pytest.mark.parametrize(  # one library each: how a job ends is tested with both in tests/comm
    ("lane", "mode", "fail", "says"),
    [
        ("mpich", "async", 'raise RuntimeError("lost a batch")', "lost a batch"),
        ("openmpi", "sync", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
    ],
    indirect=["lane"],
)
def test_one_rank_fails(mpirun: MpiRun, tmp_path: Path, mode: str, fail: str, says: str) -> None:
    done = mpirun(HEAD + FAILS.format(mode=mode, fail=fail), 2, args=[tmp_path], timeout=200, check=False)
    assert done.returncode != 0
    assert says in done.stderr
    assert "fit has ended" not in done.stdout
