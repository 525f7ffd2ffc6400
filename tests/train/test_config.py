"""The configuration: keys from files and flags merge, check, and survive a round trip through TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcasync.errors import UsageError
from hpcasync.rules import RULES, make_rule
from hpcasync.train.config import OPTIONS, make_config, read_config, rule_options, write_config

fractions = st.floats(0, 0.999)
rates = st.floats(1e-6, 10)
COMMON = {
    "epochs": st.integers(1, 1000),
    "batch": st.integers(1, 10_000),
    "seed": st.integers(0, 2**31),
    "schedule": st.sampled_from(["constant", "cosine"]),
    "base": st.sampled_from(["sgd", "momentum", "adam"]),
    "lr": rates,
    "weight_decay": fractions,
    "on_nonfinite": st.sampled_from(["skip", "abort"]),
    "slow": st.sampled_from([["1:4.0"], ["0:2", "7:1.5"]]),
}
BY_MODE = {
    "async": {"staleness": st.integers(0, 100), "rule": st.sampled_from(["asgd", "trend-smooth"])},
    "sync": {},
    "kstep": {"every": st.integers(1, 1000), "block_momentum": fractions, "nesterov": st.booleans(), "block_lr": rates},
    "hierarchical": {"every": st.integers(9, 1000), "delay": st.integers(0, 8), "groups": st.integers(1, 9)},
}


@st.composite
def keys(draw: st.DrawFn) -> dict[str, Any]:
    """Some keys of one mode."""
    mode = draw(st.sampled_from(sorted(BY_MODE)))
    possible = COMMON | BY_MODE[mode]
    chosen = draw(st.sets(st.sampled_from(sorted(possible))))
    return {"mode": mode} | {name: draw(possible[name]) for name in sorted(chosen)}


@given(keys())
def test_what_is_written_reads_back_to_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, given_keys: dict[str, Any]
) -> None:
    config = make_config(given_keys)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    write_config(config, path)
    again = make_config(read_config(str(path)))
    assert again.keys() == config.keys()
    flat = config.keys()
    for name, value in given_keys.items():
        assert flat[name] == value


@given(keys(), keys())
def test_later_sources_win(first: dict[str, Any], second: dict[str, Any]) -> None:
    first = {k: v for k, v in first.items() if k in COMMON}
    merged = make_config(first, second).keys()
    for name, value in second.items():
        assert merged[name] == value
    for name in first.keys() - second.keys():
        assert merged[name] == first[name]


def test_every_option_of_every_rule_is_a_flag() -> None:
    flags = {o.name for o in rule_options()}
    for name in RULES:
        rule = make_rule(name)
        assert rule.group_options().keys() <= flags
    assert not flags & {o.name for o in OPTIONS}


def test_dashes_and_underscores_are_the_same_key() -> None:
    assert make_config({"weight-decay": 0.5}).keys()["weight_decay"] == 0.5


def test_defaults_depend_on_the_mode() -> None:
    assert make_config({}).rule == "trend-smooth"
    assert make_config({"mode": "sync"}).rule == "plain"
    assert make_config({"mode": "kstep", "model": "pkg.mod:net", "data": "x/y.h5"}).name == "y-net-kstep"


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ({"epochs": 2.5}, "whole number"),
        ({"epochs": True}, "whole number"),
        ({"lr": "fast"}, "a number"),
        ({"betas": [0.9]}, "two numbers"),
        ({"betas": "0.9"}, "two numbers"),
        ({"masked": 1}, "true or false"),
        ({"data": 5}, "a text"),
        ({"mode": "sync", "staleness": 3}, "belongs to mode async"),
        ({"every": 3}, "belongs to mode kstep"),
        ({"mode": "hierarchical", "stall_seconds": 5}, "belongs to mode sync, kstep, async"),
        ({"mode": "sync", "stall_seconds": -1}, "expected a whole number >= 0"),
        ({"warmup": 3}, "unknown option 'warmup'"),
        ({"slow": "1:2"}, "a list of texts"),
        ({"slow": ["1:0.5"]}, "slower"),
    ],
)
def test_bad_keys(bad: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        make_config(bad)


def test_a_full_or_forbidden_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_config(make_config({}), tmp_path / "file" / "config.toml")
