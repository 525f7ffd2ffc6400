"""Times, node lists, arrays and sweeps: what parses, and one clear error for what does not."""

from __future__ import annotations

import pytest

from hpcasync.errors import UsageError
from hpcasync.slurm import parse_array, parse_nodelist, parse_sweep, parse_time


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("30", 1800),
        ("1:30", 90),
        ("01:30:00", 5400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("0-0:0:7", 7),
        (" 5 ", 300),
    ],
)
def test_time(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "-1", "1-", "1.5", "0:00", "2-1:2:3:4", "eternal"])
def test_bad_time(text: str) -> None:
    with pytest.raises(UsageError, match=r"--time .*expected a time such as 30 \(minutes\)"):
        parse_time(text)


@pytest.mark.parametrize(
    "text, names",
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("r[0-1]c[2-3]-ib", ["r0c2-ib", "r0c3-ib", "r1c2-ib", "r1c3-ib"]),
        ("nid[001234]", ["nid001234"]),
    ],
)
def test_nodelist(text: str, names: list[str]) -> None:
    assert parse_nodelist(text) == names


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "empty"),
        ("n[1-", "brackets"),
        ("n1]", "brackets"),
        ("n[[1]]", "brackets"),
        ("n[1-3", "brackets"),
        ("n[]", "list of numbers"),
        ("n[a-c]", "list of numbers"),
        ("n[3-1]", "backwards"),
        ("n[1-99999999]", "too long"),
        ("n1,,n2", "empty"),
        ("n 1", "no host name"),
        ("n1;rm", "no host name"),
        ("n[1-3],n2", "n2 is in it twice"),
    ],
)
def test_bad_nodelist(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_nodelist(text)


def test_array() -> None:
    assert parse_array("0-4") == ([0, 1, 2, 3, 4], None)
    assert parse_array("1,3,10-20:5%2") == ([1, 3, 10, 15, 20], 2)


@pytest.mark.parametrize("text", ["", "a", "4-1", "1,,2", "0-4%", "0-4%0", "1-5:0", "1,1", "0-3,2", "-1"])
def test_bad_array(text: str) -> None:
    with pytest.raises(UsageError, match=r"--array .*expected indices such as 0-4"):
        parse_array(text)


def test_sweep() -> None:
    rows = parse_sweep(["lr=0.1,0.05", "--block_momentum=0,0.5"])
    assert rows == [
        ["--lr", "0.1", "--block-momentum", "0"],
        ["--lr", "0.1", "--block-momentum", "0.5"],
        ["--lr", "0.05", "--block-momentum", "0"],
        ["--lr", "0.05", "--block-momentum", "0.5"],
    ]


@pytest.mark.parametrize("specs", [["lr"], ["=1"], ["lr="], ["lr=1,,2"], ["lr=1", "lr=2"]])
def test_bad_sweep(specs: list[str]) -> None:
    with pytest.raises(UsageError, match="--sweep"):
        parse_sweep(specs)
