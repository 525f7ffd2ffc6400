"""Registry and options of the rules: what is refused, and that the message helps."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from hpcasync.errors import UsageError
from hpcasync.kernels import BASES, HYPER, VARIANTS
from hpcasync.rules import RULES, make_rule, options_of
from hpcasync.rules.base import BASE_VECTORS, DEFAULT_LR, Rule


def test_tables_cover_each_other() -> None:
    assert set(BASES) == set(BASE_VECTORS) == set(DEFAULT_LR)
    assert sorted(BASES.values()) == list(range(len(BASES)))
    assert sorted(VARIANTS.values()) == list(range(len(VARIANTS)))
    for name, rule in RULES.items():
        assert RULES[rule.name] is rule and rule.paper and rule.__doc__, name


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("base", BASES)
def test_every_rule_takes_every_base(name: str, base: str) -> None:
    if base not in RULES[name].bases:
        with pytest.raises(UsageError, match=f"rule '{name}' has base amsgrad, found '{base}'"):
            make_rule(name, {"base": base})
        return
    rule = make_rule(name, {"base": base, "lr": None})
    assert rule.lr == type(rule).default_lr[base]
    vectors = rule.private_vectors if rule.own_copy else rule.vectors
    assert [v.name for v in vectors][: len(BASE_VECTORS[base])] == list(BASE_VECTORS[base])
    assert rule.bind(3) == rule and rule.bind(3).workers == 3 and rule.workers == 1
    assert rule.describe()["name"] == RULES[name].name and rule.describe()["base"] == base
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.lr = 1.0  # type: ignore[misc]


def test_options_and_defaults() -> None:
    assert options_of("asgd")["base"] == "sgd" and "variant" not in options_of("asgd")
    assert options_of("trend-smooth")["variant"] == "consistency"
    assert {n for n in RULES if options_of(n)["momentum"] != 0.9} == {"gsgm"} and make_rule("gsgm").momentum == 0.5
    rule = make_rule("trend-smooth", {"base": "adam", "beta": 0.5, "betas": [0.8, 0.9], "floor": None})
    assert (rule.beta, rule.betas, rule.floor) == (0.5, (0.8, 0.9), options_of("trend-smooth")["floor"])  # type: ignore[attr-defined]


def test_group_options_reach_the_kernel() -> None:
    rule = make_rule("trend-smooth", {"base": "adam", "shrink": 0.25})
    h = rule.hyper(rule.group_options() | {"lr": 7.0, "betas": (0.1, 0.2), "floor": 0.75})
    got = {n: h[HYPER[n]] for n in ("lr", "beta1", "beta2", "floor", "shrink")}
    assert got == {"lr": 7.0, "beta1": 0.1, "beta2": 0.2, "floor": 0.75, "shrink": 0.25}


@pytest.mark.parametrize(
    "call, hint",
    [
        (lambda: make_rule("trend-smoth"), "trend-smooth"),
        (lambda: make_rule("ASGD"), "asgd"),
        (lambda: make_rule("asgd", {"base": "adma"}), "adam"),
        (lambda: make_rule("asgd", {"base": "rms-prop"}), "rmsprop"),
        (lambda: make_rule("trend-smooth", {"variant": "oposed"}), "opposed"),
        (lambda: make_rule("trend-smooth", {"variant": "consistent"}), "consistency"),
    ],
)
def test_unknown_names_suggest_the_nearest(call: Any, hint: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{hint}'"):
        call()


def test_far_off_names_list_what_there_is() -> None:
    with pytest.raises(UsageError) as error:
        make_rule("xyzzy")
    assert str(error.value).startswith("unknown rule 'xyzzy'. Known: apam, asgd, dc-asgd, ")


def test_option_of_another_rule() -> None:
    with pytest.raises(UsageError, match=r"rule 'asgd' has no option 'floor'.*lr, base"):
        make_rule("asgd", {"floor": 0.1})


BAD = [
    ("lr", 0, "number in"), ("lr", -1.0, "number in"), ("lr", math.nan, r"finite number in \(0, inf\)$"),
    ("lr", math.inf, "finite"),
    ("lr", "0.1", "finite number"), ("lr", True, "finite number"), ("lr", [0.1], "finite number"),
    ("momentum", 1.0, r"\[0, 1\)"), ("momentum", -0.1, r"\[0, 1\)"),
    ("alpha", 1, r"\[0, 1\)"),
    ("betas", (0.9,), "two numbers"), ("betas", (0.9, 1.0), r"betas\[1\]"), ("betas", (-1, 0.5), r"betas\[0\]"),
    ("betas", 0.9, "two numbers"), ("betas", "ab", r"betas"),
    ("eps", -1e-9, "eps"), ("eps", math.nan, "eps"),
    ("weight_decay", -1, "weight_decay"), ("weight_decay", "x", "weight_decay"),
    ("base", "", "base"), ("base", 3, "base"),
    ("variant", "none", "variant"), ("variant", 1, "variant"),
    ("beta", 1.0, "beta"), ("beta", -0.5, "beta"),
    ("shrink", 0, "shrink"), ("shrink", 1.5, "shrink"), ("shrink", "stale", "'staleness'"), ("shrink", True, "shrink"),
    ("floor", -0.1, "floor"), ("floor", 1.1, "floor"),
    ("up", 0.9, "up"), ("up", math.inf, "up"),
    ("down", 0, "down"), ("down", 1.1, "down"),
    ("masked", "no", "masked"), ("masked", 1, "masked"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, says", BAD, ids=lambda x: str(x))
def test_bad_option(name: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        make_rule("trend-smooth", {name: value})
    assert name in str(error.value)
    parts = value if isinstance(value, tuple) else (value,)
    assert any(str(part) in str(error.value) for part in parts)


@pytest.mark.parametrize("value", [0, 0.5, 0.999])
def test_ends_of_ranges_are_allowed(value: float) -> None:
    for base, options in (
        ("nesterov", {"momentum": value}),
        ("rmsprop", {"alpha": value, "eps": 0}),
        ("adagrad", {"eps": 0}),
        ("adam", {"betas": (value, value), "eps": 0}),
    ):
        make_rule("trend-smooth", {"base": base, "beta": value, **options})
    make_rule("trend-smooth", {"floor": 1, "shrink": 1, "down": 1, "up": 1, "weight_decay": 0})


@pytest.mark.parametrize(
    "base, name, value, belongs",
    [
        ("sgd", "momentum", 0.5, "momentum, nesterov, ema"),
        ("adam", "momentum", 0.0, "momentum, nesterov, ema"),
        ("momentum", "betas", (0.9, 0.99), "adam, adamw, amsgrad"),
        ("adam", "alpha", 0.9, "rmsprop"),
        ("sgd", "eps", 1e-6, "rmsprop, adagrad, adam"),
    ],
)
def test_an_option_that_the_base_does_not_use(base: str, name: str, value: Any, belongs: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=.*base '{base}' does not use it.*{belongs}"):
        make_rule("asgd", {"base": base, name: value})
    defaults = {k: v for k, v in options_of("asgd").items() if k != "base"}
    make_rule("asgd", {"base": base, **defaults})  # as a configuration file has them


BAD_OPTIONS = [
    ("dc-asgd", {"compensation": -1}, "compensation=-1"), ("dc-asgd", {"adaptive": 1}, "adaptive=1: expected True"),
    ("dc-asgd", {"square_decay": 1.0}, r"square_decay=1.0.*\[0, 1\)"), ("dc-asgd", {"square_eps": 0}, "square_eps=0"),
    ("apam", {"style": "codes"}, "did you mean 'code'"), ("apam", {"bias_correction": "no"}, "bias_correction='no'"),
    ("apam", {"step_size": "sqr"}, "did you mean 'sqrt'"), ("apam", {"low": "x"}, "low='x'"),
    ("apam", {"low": 1.0, "high": 1.0}, "low < high"), ("apam", {"high": math.nan}, "high=nan"),
    ("apam", {"base": "adam"}, "'apam' has base amsgrad, found 'adam'"), ("apam", {"eps": -1}, "eps=-1"),
    ("apam", {"momentum": 0.5}, "does not use it"),
    ("easgd", {"period": 0}, "period=0: expected a whole number >= 1"), ("easgd", {"period": 2.0}, "period=2.0"),
    ("eamsgd", {"moving_rate": 0}, r"moving_rate=0.*\(0, 1\]"), ("easgd", {"moving_rate": 1.5}, "moving_rate=1.5"),
    ("gsgm", {"average": "windows"}, "did you mean 'window'"), ("gsgm", {"out_of_turn": "drop"}, "'drop'.*discard, hold"),
    ("gsgm", {"window": 0}, "window=0"), ("gsgm", {"window": 2, "average": "round"}, "average='window' or"),
    ("gsgm", {"patience": 0}, "patience=0"), ("gsgm", {"patience": math.inf}, "patience=inf"),
    ("hogwild", {"momentum": 0.5}, "does not use it"), ("staleness-aware", {"floor": 0.1}, "no option 'floor'"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, says", BAD_OPTIONS, ids=str)
def test_bad_option_of_each_rule(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_rule(name, options)


def test_bad_window_for_the_workers() -> None:
    with pytest.raises(UsageError, match="window=5: expected at most the number of workers, 4"):
        make_rule("gsgm", {"window": 5}).bind(4)


def test_described_options_make_the_same_rule() -> None:
    for name in RULES:
        rule = make_rule(name)
        options = {k: v for k, v in rule.describe().items() if k != "name"}
        assert make_rule(name, options) == rule
    adaptive = make_rule("dc-asgd", {"adaptive": True})
    assert adaptive.describe()["compensation"] == 2 and make_rule("dc-asgd").describe()["compensation"] == 0.04
    assert make_rule("apam", {"style": "paper"}).describe()["eps"] == 0


def test_reference_of_the_base_class_applies_the_step() -> None:
    class Halving(Rule):
        def reference_modifier(self, state, step, group, tau):  # type: ignore[no-untyped-def]
            return step / np.float32(2)

    rule = Halving(lr=1.0)
    state = {"w": np.zeros(2, np.float32)}
    rule.reference(state, np.array([2, 4], np.float32), rule.group_options(), 1, 0)
    assert state["w"].tolist() == [-1, -2]
