"""KStep's presets against trajectories computed by hand, and the schedule of K."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hpcasync.comm import World
from hpcasync.errors import UsageError
from hpcasync.modes import KStep
from hpcasync.modes.interval import interval_at, parse_every
from hpcasync.modes.presets import PRESETS, preset_options
from hpcasync.train.config import make_config
from tests.mpi import MpiRun

from .toys import mlp

mpich = pytest.mark.parametrize("lane", ["mpich"], indirect=True)


# Every parameter starts at 10 and has the gradient 1 on rank 0 and 3 on rank 1: with SGD, lr 0.5, two local steps move the
# ranks by -1 and -3, so d = -2. With momentum 0.5 they move by -1.25 g, d = -2.5, and in the next block, if the momentum
# is kept, by -1.8125 g, d = -3.625. AdamW steps by lr whatever the gradient: d = -1.
BY_HAND = {
    "k-avg": ("k-avg", {}, {}, [8, 6]),
    "m-avg": ("m-avg", {}, {}, [8, 8 - (1 + 2)]),
    "m-avg nesterov": ("m-avg", {"nesterov": True}, {}, [10 - 2 - 1, 7 - 2 - 1.5]),
    "post-local": ("post-local", {"warm_start": 2}, {}, [8, 6]),  # the first block is two averages of one step
    "bmuf": ("bmuf", {}, {"momentum": 0.5}, [7.5, 7.5 - (1.25 + 2.5)]),
    "bmuf keep": ("bmuf", {"inner_state": "keep"}, {"momentum": 0.5}, [7.5, 7.5 - (1.25 + 3.625)]),
    "bmuf nesterov": ("bmuf", {"nesterov": True}, {}, [7, 3.5]),
    "slowmo": ("slowmo", {}, {"momentum": 0.5}, [7.5, 7.5 - (1.5 + 2.5)]),
    "slowmo keep": ("slowmo", {"inner_state": "keep"}, {"momentum": 0.5}, [7.5, 7.5 - (1.5 + 3.625)]),
    "diloco": ("diloco", {}, {}, [10 - 1.4 - 0.9 * 1.4, 7.34 - 1.4 - 0.9 * (0.9 * 1.4 + 1.4)]),
    "diloco adamw": ("diloco", {}, {"adamw": True}, [10 - 0.7 - 0.63, 8.67 - 0.7 - 0.9 * 1.33]),
}

PROGRAM = """
import json, sys
import torch
import hpcasync as ha

world = ha.init()
for key, (preset, options, inner, expected) in json.loads(sys.argv[1]).items():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(10)
    if inner.pop("adamw", False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **inner)
    opt = ha.KStep.preset(preset, optimizer, world=world, **{"every": 2, **options})
    found = []
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + 2 * world.rank)
        opt.step()
        if step % 2:
            for p in model.parameters():
                assert p.unique().numel() == 1, (key, p)
            found.append(model.weight[0, 0].item())
    assert all(abs(a - b) < 1e-4 for a, b in zip(found, expected, strict=True)), (key, found, expected)
    opt.close()
print("done")
"""


def test_two_blocks_by_hand(mpirun: MpiRun) -> None:
    assert mpirun(PROGRAM, 2, args=[json.dumps(BY_HAND)]).stdout.count("done") == 2


@mpich
def test_without_momentum_all_are_k_avg(mpirun: MpiRun) -> None:
    """Bit for bit; and post-local with an endless warm start is KStep with K = 1."""
    mpirun(
        """
        import numpy as np, torch
        import hpcasync as ha
        from tests.modes.toys import flat, mlp, train

        world = ha.init()

        def run(make, steps=range(9)):
            model = mlp()
            opt = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            train(opt, model, steps, world.rank)
            opt.close()
            return flat(model)

        def preset(name, **options):
            return lambda inner: ha.KStep.preset(name, inner, **options)

        base = run(lambda inner: ha.KStep(inner, every=3))
        plain = {"every": 3, "block_momentum": 0.0, "block_lr": 1.0, "inner_state": "keep"}
        for name in ("k-avg", "m-avg", "bmuf", "slowmo", "diloco"):
            assert np.array_equal(base, run(preset(name, **plain))), name
        assert not np.array_equal(base, run(preset("m-avg", every=3)))
        one = run(lambda inner: ha.KStep(inner, every=1))
        assert np.array_equal(one, run(preset("post-local", every=3)))
        assert np.array_equal(one, run(lambda inner: ha.KStep(inner, every="1:9,3")))
        assert np.array_equal(base, run(lambda inner: ha.KStep(inner, every="3:2,3")))
        """,
        2,
    )


def test_bmuf_takes_the_number_of_ranks() -> None:
    assert preset_options("bmuf", 8)["block_momentum"] == 1 - 1 / 8
    assert preset_options("bmuf", 8, {"block_momentum": 0.3})["block_momentum"] == 0.3
    assert make_config({"mode": "kstep", "preset": "bmuf"}, workers=lambda: 4).block_momentum == 0.75


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_kstep_and_a_configuration(name: str) -> None:
    opt = KStep.preset(name, torch.optim.SGD(mlp().parameters(), lr=0.1), world=World())
    expected = preset_options(name, 1)
    assert {k: getattr(opt.options, k) for k in expected} == expected
    config = make_config({"mode": "kstep", "preset": name}, workers=lambda: 1)
    assert {k: getattr(config, k) for k in expected} == expected
    assert make_config(config.keys()) == config  # as the written file is read back
    assert PRESETS[name].paper and PRESETS[name].line
    opt.close()


def test_given_options_win_over_the_preset() -> None:
    config = make_config({"mode": "kstep", "preset": "diloco"}, {"every": 7})
    assert (config.every, config.block_lr, config.options["base"]) == (7, 0.7, "adamw")
    assert make_config({"mode": "kstep", "preset": "diloco", "base": "sgd"}).options["base"] == "sgd"
    opt = KStep.preset("diloco", torch.optim.SGD(mlp().parameters(), lr=0.1), world=World(), every=9)
    assert opt.options.every == 9 and opt.options.nesterov
    opt.close()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"preset": "dilocco"}, "did you mean 'diloco'"),
        ({"preset": "k-avg", "block_momentum": 0.5}, "preset k-avg with block_momentum=0.5"),
        ({"preset": "post-local", "block_momentum": 0.5}, "preset post-local with block_momentum=0.5"),
        ({"preset": 3}, "expected a text"),
        ({"every": 0}, "every=0: expected a whole number >= 1"),
        ({"every": "8:100"}, "expected a whole number, or K:STEP"),
        ({"every": "1:100,8:50,32"}, "step 50 after 100"),
        ({"every": "1:0,8"}, "step 0 after 0"),
        ({"every": "0:10,8"}, "K is 0"),
        ({"every": "1:x,8"}, "expected a whole number, or K:STEP"),
        ({"every": "1,8"}, "expected a whole number, or K:STEP"),
        ({"every": ""}, "expected a whole number, or K:STEP"),
        ({"every": 1.5}, "expected a whole number or a schedule"),
    ],
)
def test_bad_settings(keys: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_config({"mode": "kstep"} | keys)


def test_preset_belongs_to_kstep() -> None:
    with pytest.raises(UsageError, match="--preset belongs to mode kstep"):
        make_config({"mode": "sync", "preset": "k-avg"})


def test_schedule_of_k() -> None:
    assert parse_every(32) == ((32, math.inf),)
    pieces = parse_every("1:100, 8:500, 32")
    assert pieces == ((1, 100), (8, 500), (32, math.inf))
    assert [interval_at(pieces, s) for s in (0, 99, 100, 499, 500, 10**6)] == [1, 1, 8, 8, 32, 32]


def averages_at(every: int | str, steps: int, **options: object) -> list[int]:
    model = mlp()
    opt = KStep(torch.optim.SGD(model.parameters(), lr=0.1), every=every, world=World(), **options)  # type: ignore[arg-type]
    found = []
    for step in range(1, steps + 1):
        before = opt.averages
        opt.step()
        found += [step] * (opt.averages - before)
    opt.close()
    return found


def test_a_block_keeps_its_k() -> None:
    assert averages_at("1:2,3:8,2", 12) == [1, 2, 5, 8, 10, 12]
    assert averages_at("1:2,3:7,2", 12) == [1, 2, 5, 8, 10, 12]  # the block from 5 on has begun before 7
    assert averages_at("1:2,3:5,4", 13) == [1, 2, 5, 9, 13]
    assert averages_at("4:4,2", 8, warm_start=2) == [1, 2, 6, 8]


def test_a_schedule_goes_on_after_loading() -> None:
    def make() -> KStep:
        return KStep(torch.optim.SGD(mlp().parameters(), lr=0.1), every="2:4,5", world=World())

    first, second = make(), make()
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.averages == 2
    second.step()
    assert second.averages == 3  # steps 2, 4, 9


@mpich
def test_command_line(mpirun: MpiRun) -> None:
    common = ["train", "--mode", "kstep", "--epochs", "2", "--json", "--output"]
    mpirun.cli([*common, "bmuf", "--preset", "bmuf", "--every", "1:10,4", "--nesterov"], 2)
    text = (mpirun.folder / "bmuf" / "config.toml").read_text()
    for line in ('preset = "bmuf"', "block_momentum = 0.5", 'every = "1:10,4"', "nesterov = true", 'inner_state = "reset"'):
        assert line in text
    mpirun.cli([*common, "again", "--config", "bmuf/config.toml"], 2)
    done = mpirun.cli(["train", "--mode", "kstep", "--every", "x"], 2, check=False)
    assert done.returncode == 2 and "every='x': expected a whole number, or K:STEP" in done.stderr
