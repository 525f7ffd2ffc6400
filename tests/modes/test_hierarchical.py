"""Asynchronous inside a group, K-step averages among the groups: against trajectories by hand, Async and KStep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcasync.errors import UsageError
from hpcasync.modes.block import BlockOptions, check_delay
from hpcasync.train.config import make_config
from tests.comm.test_backends import need
from tests.hosts import HostsRun
from tests.mpi import Lane, MpiRun

mpich = pytest.mark.parametrize("lane", ["mpich"], indirect=True)

# Parameters start at 10, the gradient is 1 in group 0 and 3 in group 1, lr 0.5, one rank per group, K = 2.
# Without delay d = -2, as in KStep. With delay 1 the groups send 9 and 7 after step 2; after step 3 group 0 is at 8.5 and
# is moved by 8 - 9, group 1 at 5.5 and is moved by 8 - 7; after step 4 they send 7 and 5, and so on.
BY_HAND = {
    "plain": ({}, [[9.5, 8, 7.5, 6], [8.5, 8, 6.5, 6]]),
    "momentum": ({"block_momentum": 0.5}, [[9.5, 8, 7.5, 5], [8.5, 8, 6.5, 5]]),
    "warm start": ({"warm_start": 1}, [[9, 8.5, 7, 6.5], [9, 7.5, 7, 5.5]]),
    "delay": ({"delay": 1}, [[9.5, 9, 7.5, 7, 5.5], [8.5, 7, 6.5, 5, 4.5]]),
    # v = -2, the model 8; then the mean of what is sent is 6: v = 0.5 * -2 + (6 - 8) = -3, the model 5.
    "delay, momentum": ({"delay": 1, "block_momentum": 0.5}, [[9.5, 9, 7.5, 7, 4.5], [8.5, 7, 6.5, 5, 3.5]]),
}

PROGRAM = """
import json, sys
import torch
import hpcasync as ha

world = ha.init()
for key, (options, expected) in json.loads(sys.argv[1]).items():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(10.0 + world.rank)  # rank 0's is everybody's
    opt = ha.Hierarchical(model, ha.rules.ASGD(lr=0.5), every=2, groups=2, world=world, **options)
    found = []
    for want in expected[world.rank]:
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + 2 * world.rank)
        opt.step()
        assert all(p.unique().numel() == 1 for p in model.parameters()), key
        found.append(model.weight[0, 0].item())
    assert all(abs(a - b) < 1e-5 for a, b in zip(found, expected[world.rank], strict=True)), (key, found)
    opt.synchronize()
    assert len(set(world.gather(model.bias[0].item()))) == 1, key
    opt.close()
print("done")
"""


def test_two_groups_by_hand(mpirun: MpiRun) -> None:
    assert mpirun(PROGRAM, 2, args=[json.dumps(BY_HAND)]).stdout.count("done") == 2


@pytest.mark.parametrize("collectives", ["window", "torch", "horovod"])
def test_two_groups_by_hand_on_every_backend(mpirun: MpiRun, lane: Lane, collectives: str) -> None:
    need(collectives, lane)
    cases = {name: (options | {"collectives": collectives}, expected) for name, (options, expected) in BY_HAND.items()}
    assert mpirun(PROGRAM, 2, args=[json.dumps(cases)], timeout=200).stdout.count("done") == 2


@mpich
@pytest.mark.parametrize("delay", [0, 2])
def test_groups_of_two_train_and_end_with_one_model(mpirun: MpiRun, delay: int) -> None:
    mpirun(
        f"""
        import numpy as np, torch
        import hpcasync as ha
        from tests.modes.toys import flat, mlp, train

        world = ha.init()
        for rule in (ha.rules.ASGD(lr=0.05), ha.rules.TrendSmooth(lr=0.05), ha.rules.GSGM(lr=0.05)):
            model = mlp()
            opt = ha.Hierarchical(model, rule, every=3, block_momentum=0.3, groups=2, delay={delay}, staleness=4, world=world)
            start = flat(model).copy()
            train(opt, model, range(9), world.rank)
            opt.synchronize()  # with a delay the third average has just begun
            train(opt, model, range(9, 10), world.rank)
            opt.synchronize()
            everyone = world.gather(flat(model).copy())
            assert all(np.array_equal(everyone[0], w) for w in everyone), rule.name
            assert not np.array_equal(start, everyone[0]) and np.isfinite(everyone[0]).all()
            assert opt.averages == 4 + (opt.delay > 0) and opt.groups == 2 and opt.world.size == 2
            opt.close()
        """,
        4,
    )


@mpich
def test_state_goes_on_as_if_never_stopped(mpirun: MpiRun) -> None:
    """Groups of one rank are deterministic: bit for bit, the block's momentum included."""
    mpirun(
        """
        import numpy as np, torch
        import hpcasync as ha
        from tests.modes.toys import flat, mlp, train

        world = ha.init()

        def make(model):
            rule = ha.rules.TrendSmooth(base="momentum", lr=0.05)
            return ha.Hierarchical(model, rule, every=3, block_momentum=0.5, groups=2, inner_state="average", world=world)

        model = mlp()
        opt = make(model)
        train(opt, model, range(6), world.rank)
        saved = {k: v.clone() for k, v in model.state_dict().items()}, opt.state_dict()
        train(opt, model, range(6, 12), world.rank)
        expected = flat(model).copy()
        opt.close()

        model = mlp()
        opt = make(model)
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        train(opt, model, range(6, 12), world.rank)
        assert np.array_equal(expected, flat(model)), abs(expected - flat(model)).max()
        opt.close()
        """,
        2,
    )


CHECKPOINT = """
    import numpy as np, torch
    import hpcasync as ha
    from tests.modes.toys import flat, mlp, train

    world = ha.init()

    def make(model, groups, delay=0):
        rule = ha.rules.TrendSmooth(base="momentum", lr=0.05)
        return ha.Hierarchical(model, rule, every=4, block_momentum=0.5, delay=delay, groups=groups, world=world)
    """


def test_a_checkpoint_inside_a_block_goes_on_as_if_never_stopped(mpirun: MpiRun, tmp_path: Path) -> None:
    """Groups of one rank are deterministic. With a delay an average is under way when the checkpoint is made."""
    mpirun(
        CHECKPOINT
        + f"""
    for delay in (0, 3):
        path = f"{tmp_path}/{{delay}}.h5"
        model = mlp()
        opt = make(model, 2, delay)
        train(opt, model, range(9), world.rank)
        assert (opt._pending is None) == (delay == 0)
        ha.save_checkpoint(path, opt)
        train(opt, model, range(9, 20), world.rank)
        opt.synchronize()
        expected, averages = flat(model).copy(), opt.averages
        opt.close()

        model = mlp()
        opt = make(model, 2, delay)
        restored = ha.load_checkpoint(path, opt)
        assert restored.reset == () and opt.steps == 9
        train(opt, model, range(9, 20), world.rank)
        opt.synchronize()
        assert np.array_equal(expected, flat(model)) and opt.averages == averages, delay
        opt.close()
    """,
        2,
    )


@mpich
def test_on_other_groups_all_go_on_from_the_mean(mpirun: MpiRun, tmp_path: Path) -> None:
    """Four ranks in two groups, then two groups of one, one group of two, and one rank."""
    mpirun(
        CHECKPOINT
        + f"""
    model = mlp()
    opt = make(model, 2)
    train(opt, model, range(6), world.rank)  # an average after 4 steps: two more inside a block
    ha.save_checkpoint("{tmp_path}/four.h5", opt)
    group = opt.store.state[0].copy()
    models = world.gather(group)
    velocity = opt.block_state().get("velocity")
    world.collectives.barrier()
    if world.rank == 0:
        np.savez("{tmp_path}/four.npz", mean=np.mean([m.astype(np.float64) for m in models], axis=0), velocity=velocity)
        assert not np.array_equal(models[0], models[-1]) and velocity.any()
    opt.close()
    """,
        4,
    )
    for ranks, groups in ((2, 2), (2, 1), (1, 1)):
        mpirun(
            CHECKPOINT
            + f"""
    model = mlp()
    opt = make(model, {groups})
    restored = ha.load_checkpoint("{tmp_path}/four.h5", opt)
    assert "mean" in restored.reset[0] and any("buffer" in text or "momentum" in text for text in restored.reset), restored.reset
    saved = np.load("{tmp_path}/four.npz")
    assert np.allclose(opt.store.state[0], saved["mean"], atol=1e-7) and opt._since == 0
    assert all(np.array_equal(part, saved["velocity"]) for name, part in opt.block_state().items() if name == "velocity")
    world.collectives.barrier()  # the others look at the same window
    train(opt, model, range(6, 12), world.rank)
    opt.synchronize()
    assert np.isfinite(flat(model)).all()
    opt.close()
    """,
            ranks,
        )


@mpich
def test_stopped_and_resumed_from_the_shell(mpirun: MpiRun, tmp_path: Path) -> None:
    """Every K steps a checkpoint; going on from the last one before the end gives the same bits."""
    args = ["train", "--mode", "hierarchical", "--groups", "2", "--every", "6", "--block-momentum", "0.3", "--model", "logistic"]
    args += ["--epochs", "2", "--batch", "64", "--seed", "3", "--json", "--checkpoint-every", "7", "--keep", "2"]
    whole = json.loads(mpirun.cli([*args, "--output", tmp_path / "whole"], 2).stdout.splitlines()[-1])
    first, last = sorted((tmp_path / "whole").glob("checkpoint-*.h5"))
    assert first != last
    again = json.loads(mpirun.cli([*args, "--output", tmp_path / "again", "--resume", first], 2).stdout.splitlines()[-1])
    assert again["resumed_from"] and again["restarts"] == 1
    assert (again["test_loss"], again["test_accuracy"]) == (whole["test_loss"], whole["test_accuracy"])


@mpich
@pytest.mark.parametrize("delay", [0, 3])
def test_the_simulator_makes_the_same_run(mpirun: MpiRun, tmp_path: Path, delay: int) -> None:
    """Groups of one rank go the same way whatever the times are: same batches, same averages, the same losses."""
    args = ["--mode", "hierarchical", "--groups", "2", "--every", "5", "--block-momentum", "0.5", "--model", "logistic"]
    args += ["--epochs", "2", "--batch", "32", "--seed", "3", "--delay", str(delay), "--json", "--rule", "asgd", "--lr", "0.02"]
    live = json.loads(mpirun.cli(["train", *args, "--output", tmp_path / "live"], 2).stdout.splitlines()[-1])
    words = ["simulate", *args, "--workers", "2", "--compute", "lognormal:1.0,0.3", "--output", tmp_path / "simulated"]
    simulated = json.loads(mpirun.cli(words, None).stdout.splitlines()[-1])
    assert simulated["test_loss"] == pytest.approx(live["test_loss"], rel=1e-5)
    assert simulated["train_loss"] == pytest.approx(live["train_loss"], rel=1e-5)


@mpich
def test_from_the_shell(mpirun: MpiRun) -> None:
    args = ["train", "--mode", "hierarchical", "--groups", "2", "--every", "8", "--block-momentum", "0.3", "--delay", "4"]
    done = mpirun.cli([*args, "--epochs", "4", "--batch", "8", "--json"], 4, timeout=350)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["mode"] == "hierarchical" and result["rule"] == "trend-smooth"
    assert result["test_accuracy"] > 0.85 and result["staleness"]["max"] >= 1


@mpich
@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        (["--groups", "3"], 2, "groups=3: 3 per node, but a node has 2 rank(s)"),
        (["--every", "4", "--delay", "4"], 1, "delay=4: expected fewer steps than every (4), so that"),
        (["--inner-state", "average", "--delay", "1"], 1, "inner_state='average' with delay=1"),
        (["--rule", "easgd"], 1, "rule 'easgd' trains a copy per rank"),
        (["--preset", "bmuf"], 1, "--preset belongs to mode kstep"),
    ],
)
def test_bad_input(mpirun: MpiRun, flags: list[str], ranks: int, words: str) -> None:
    done = mpirun.cli(["train", "--mode", "hierarchical", *flags], ranks, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_options() -> None:
    config = make_config({"mode": "hierarchical", "delay": 3, "groups": 2, "staleness": 4})
    assert (config.rule, config.delay, config.groups, config.staleness, config.every) == ("trend-smooth", 3, 2, 4, 32)
    assert make_config(config.keys()) == config
    check_delay(7, BlockOptions(every="8:100,32"))
    for delay in (8, -1, 1.5):
        with pytest.raises(UsageError, match="delay"):
            check_delay(delay, BlockOptions(every="8:100,32"))
    with pytest.raises(UsageError, match="--delay belongs to mode hierarchical"):
        make_config({"mode": "kstep", "delay": 1})


def test_over_separate_hosts(two_hosts: HostsRun, tmp_path: Path) -> None:
    """A group per host, with windows of its own; the average goes over the link; stopped and resumed there."""
    args = ["train", "--mode", "hierarchical", "--every", "6", "--block-momentum", "0.3", "--model", "logistic", "--epochs", "2"]
    args += ["--batch", "32", "--delay", "3", "--json", "--output", tmp_path / "run"]
    result = json.loads(two_hosts.cli(args, 4).stdout.splitlines()[-1])
    assert (result["nodes"], result["ranks"]) == (2, 4) and result["test_accuracy"] > 0.6
    args = [*args[:-1], tmp_path / "more", "--epochs", "3", "--resume", tmp_path / "run" / "checkpoint-000002.h5"]
    again = json.loads(two_hosts.cli(args, 4).stdout.splitlines()[-1])
    assert again["resumed_from"] and again["test_loss"] < result["test_loss"]


def test_over_four_hosts(four_hosts: HostsRun) -> None:
    """Two ranks per host: their windows meet in averages of four; each host's ranks push, and all end with one model."""
    four_hosts(
        """
        import numpy as np
        import hpcasync as ha
        from tests.modes.toys import flat, mlp, train

        world = ha.init()
        assert (world.size, world.nodes) == (8, 4), world
        for delay in (0, 2):
            model = mlp(seed=world.rank)  # rank 0's is everybody's
            rule = ha.rules.TrendSmooth(lr=0.05)
            opt = ha.Hierarchical(model, rule, every=4, block_momentum=0.5, delay=delay, staleness=2, world=world)
            assert opt.groups == 4 and opt.world.size == 2
            train(opt, model, range(6), world.rank)
            models = world.gather(flat(model))
            inside = [np.array_equal(a, b) for a, b in zip(models[:-1:2], models[2::2])]
            assert not any(inside), inside  # hosts differ between two averages
            train(opt, model, range(6, 8), world.rank)
            opt.synchronize()
            models = world.gather(flat(model))
            assert all(np.array_equal(models[0], m) for m in models) and np.isfinite(models[0].view(np.float32)).all()
            assert sum(world.gather(opt.updates)) == 8 * 8 and opt.averages >= 2
            opt.close()
        print("done", flush=True)
        """,
        8,
        timeout=250,
    )
