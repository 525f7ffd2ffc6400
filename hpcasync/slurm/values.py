"""What Slurm writes in a short form of its own: times, node lists, array indices; and the values of a sweep."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from hpcasync.errors import UsageError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_MOST_NODES = 100_000


def parse_time(text: str) -> int:
    """Seconds of a time limit: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s.

    Raises:
        UsageError: another form, or 0.
    """
    match = _TIME.fullmatch(text.strip())
    seconds = 0
    if match is not None:
        clock = [int(part) for part in match["clock"].split(":")]
        if match["days"] is not None:  # hours first
            h, m, s = [*clock, 0, 0][:3]
        elif len(clock) == 3:
            h, m, s = clock
        else:
            h, m, s = 0, *[*clock, 0][:2]
        seconds = 86400 * int(match["days"] or 0) + 3600 * h + 60 * m + s
    if seconds <= 0:
        raise UsageError(f"--time {text!r}: expected a time such as 30 (minutes), 1:30:00 (h:m:s) or 2-12 (days-hours)")
    return seconds


def parse_nodelist(text: str, flag: str = "--nodelist") -> list[str]:
    """The host names of a node list such as ``n[1-3,07],login1``, in its order.

    Args:
        text: in Slurm's form; numbers keep their leading zeros.
        flag: what to name in the error.

    Raises:
        UsageError: it does not parse, or names a host twice.
    """
    names: list[str] = []
    for item in _split(text, flag):
        pieces = re.split(r"\[([^\[\]]*)\]", item)
        choices = [_numbers(p, text, flag) if i % 2 else [p] for i, p in enumerate(pieces)]
        names += ["".join(parts) for parts in itertools.islice(itertools.product(*choices), _MOST_NODES)]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise _bad_list(text, flag, f"{name!r} is no host name")
    twice = sorted({n for n in names if names.count(n) > 1}) if len(names) < 1000 else []
    if twice:
        raise _bad_list(text, flag, f"{twice[0]} is in it twice")
    return names


def _split(text: str, flag: str) -> list[str]:
    """The items between the commas that stand outside of brackets."""
    items, depth = [""], 0
    for char in text.strip():
        depth += {"[": 1, "]": -1}.get(char, 0)
        if depth not in (0, 1):
            raise _bad_list(text, flag, "its brackets do not match")
        if char == "," and not depth:
            items.append("")
        else:
            items[-1] += char
    if depth:
        raise _bad_list(text, flag, "its brackets do not match")
    if not all(items):
        raise _bad_list(text, flag, "a name is empty")
    return items


def _numbers(inside: str, text: str, flag: str) -> list[str]:
    found: list[str] = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise _bad_list(text, flag, f"'[{inside}]' is no list of numbers and ranges")
        low, high = match[1], match[2] or match[1]
        if not int(low) <= int(high) < int(low) + _MOST_NODES:
            raise _bad_list(text, flag, f"the range {part} runs backwards or is too long")
        found += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return found


def _bad_list(text: str, flag: str, why: str) -> UsageError:
    return UsageError(f"{flag} {text!r} does not parse: {why}; expected host names such as n[1-4,07],login1")


def parse_array(text: str) -> tuple[list[int], int | None]:
    """The indices of ``0-4``, ``1,3,5-9:2`` or ``0-99%8``, and how many may run at a time (None: all).

    Raises:
        UsageError: it does not parse.
    """
    body, percent, most = text.strip().partition("%")
    indices: list[int] = []
    good = not percent or (most.isdecimal() and int(most) > 0)
    for part in body.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is None:
            good = False
            break
        low, high, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        good = good and step > 0 and low <= high < low + _MOST_NODES
        indices += range(low, high + 1, step) if good else []
    if not good or len(set(indices)) != len(indices):
        raise UsageError(f"--array {text!r} does not parse: expected indices such as 0-4, 1,3,5-9:2 or 0-99%8 (8 at a time)")
    return indices, int(most) if percent else None


def parse_sweep(specs: Sequence[str]) -> list[list[str]]:
    """The flags of every combination of ``key=value,value,...``, the first key varying slowest.

    Raises:
        UsageError: no ``=``, no value, a key twice.
    """
    axes: dict[str, list[list[str]]] = {}
    for spec in specs:
        key, _, values = spec.partition("=")
        key = key.strip().lstrip("-").replace("_", "-")
        words = values.split(",")
        if not key or not all(words):
            raise UsageError(f"--sweep {spec!r}: expected a flag of train and its values, such as lr=0.1,0.05")
        if key in axes:
            raise UsageError(f"--sweep {spec!r}: {key} is swept twice; give all its values at once")
        axes[key] = [[f"--{key}", word] for word in words]
    return [list(itertools.chain(*row)) for row in itertools.product(*axes.values())]
