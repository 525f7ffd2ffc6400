from __future__ import annotations

import pytest

from hpcasync.errors import UsageError
from hpcasync.scaling.cases import BASE, Case, make_cases

KEYS = {"data": "digits", "model": "logistic", "device": "cpu", "threads": 1}


def cases(ranks: int, names=("sync", "async:asgd"), kinds=("weak", "strong"), **more) -> list[Case]:
    return make_cases(names, kinds, KEYS, batch=32, global_batch=128, ranks=ranks, **more)


def test_batches_of_weak_and_strong_scaling() -> None:
    found = cases(4)
    assert [(c.kind, c.name, c.config.batch) for c in found] == [
        ("weak", "sync", 32), ("weak", "async:asgd", 32), ("strong", "sync", 32), ("strong", "async:asgd", 32),
    ]  # fmt: skip
    assert {c.config.batch for c in cases(2) if c.kind == "strong"} == {64}


def test_one_rank_measures_the_base_first() -> None:
    assert [(c.kind, c.name, c.config.batch) for c in cases(1, names=["sync"])] == [
        ("weak", BASE, 32), ("weak", "sync", 32), ("strong", BASE, 128), ("strong", "sync", 128),
    ]  # fmt: skip


def test_a_case_takes_the_options_that_its_mode_has() -> None:
    names, block = ["kstep", "hierarchical:asgd", "sync", "async"], {"every": 8, "collectives": "window"}
    found = cases(4, names=names, kinds=["weak"], block=block)
    kstep, hierarchical, sync, asynchronous = (c.config for c in found)
    assert kstep.every == hierarchical.every == 8
    assert sync.collectives == kstep.collectives == "window" != asynchronous.collectives
    assert hierarchical.groups == 2 and hierarchical.rule == "asgd"
    assert cases(4, names=["hierarchical"], kinds=["weak"], nodes=4)[0].config.groups is None  # one per node


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": ["wide"]}, ["wide", "weak"]),
        ({"names": ["asynk"]}, ["asynk", "async"]),
        ({"names": ["async:agd"]}, ["agd", "asgd"]),
        ({"ranks": 3}, ["128", "3 ranks"]),
    ],
)
def test_bad_input(change: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        cases(**{"ranks": 2, **change})
    assert all(word in str(error.value) for word in words)
