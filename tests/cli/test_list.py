"""``hpcasync list``: everything that has a name is listed, every option explained."""

from __future__ import annotations

import json

import pytest

from hpcasync.cli import main
from hpcasync.cli.list import catalogue
from hpcasync.data import known as data_sets
from hpcasync.docstrings import attributes_of, first_line, section, source_of
from hpcasync.models import known as models
from hpcasync.modes import MODES
from hpcasync.modes.presets import PRESETS
from hpcasync.rules import RULES, options_of
from hpcasync.train.config import rule_options


def test_everything_is_there_with_one_line() -> None:
    found = catalogue()
    names: dict[str, list[str]] = {}
    for entry in found:
        names.setdefault(entry.kind, []).append(entry.name)
        assert 5 < len(entry.line) < 300 and "\n" not in entry.line, entry
    assert names["rule"] == list(RULES)
    assert names["mode"] == [*MODES, "guided"]
    assert names["preset"] == list(PRESETS)
    assert names["model"] == list(models())
    assert names["data set"] == list(data_sets())
    assert [e.name for e in found if not e.paper] == []


def test_every_option_is_explained_once_in_its_docstring() -> None:
    for entry in catalogue():
        for name, (_, text) in entry.options.items():
            assert text, (entry.kind, entry.name, name)
    for name, rule in RULES.items():
        assert set(options_of(name)) <= set(attributes_of(rule)), name
    assert all(option.help for option in rule_options())


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("trend-smooth", "kstep", "diloco", "lenet5", "fashion-mnist", "2311.08105"):
        assert name in out


def test_one_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "Trend_Smooth"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "RECONSTRUCTION" in out
    for part in ("beta │ 0.99", "decay of the trend, in [0, 1)", "weight_decay │ 0.0", "variant │ consistency"):
        assert part in out, out


def test_a_default_of_its_own_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "gsgm", "--json"]) == 0
    default, text = json.loads(capsys.readouterr().out)[0]["options"]["momentum"]
    assert default == 0.5 and "no source gives a value" in text


@pytest.mark.parametrize("name", ["sync", "bmuf", "mlp", "digits"])
def test_one_of_each_kind(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["list", name]) == 0
    assert f" {name}: " in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "kstep", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["kind"] == "mode" and entry["options"]["every"][0] == 32


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "trend-smoth"]) == 2
    assert "did you mean 'trend-smooth'?" in capsys.readouterr().err


class Parent:
    """A parent. With a second sentence.

    Attributes:
        one: the first
            in two lines.
        two, three: both ``such``.

        four (int): after a blank line: with a colon.

    Source: somebody,
    somewhere.

    Args:
        five: is no attribute.
    """


class Child(Parent):
    """Overrides v. 2.0 of the parent.

    Attributes:
        one: another.
    """


class Silent(Child):
    pass


def test_docstrings_are_read() -> None:
    assert first_line(Parent) == "A parent" and first_line(Child) == "Overrides v. 2.0 of the parent"
    assert section(Parent, "Args") == {"five": "is no attribute"}
    expected = {"two": "both such", "three": "both such", "four": "after a blank line: with a colon"}
    assert attributes_of(Parent) == {"one": "the first in two lines", **expected}
    assert attributes_of(Silent) == {"one": "another", **expected}
    assert source_of(Parent) == "somebody, somewhere" and source_of(Child) == ""
