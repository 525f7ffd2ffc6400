"""What one check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATUSES = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        check: what was looked at.
        status: ok; warn: works, but not as it could; fail: training will fail or be wrong.
        found: what is there.
        remedy: what to do; empty where all is well.
    """

    check: str
    status: str
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Line:
    """A line without a complaint."""
    return Line(check, "ok", found)


def warn(check: str, found: str, remedy: str) -> Line:
    """A line about what works less well than it could."""
    return Line(check, "warn", found, remedy)


def fail(check: str, found: str, remedy: str) -> Line:
    """A line about what will not work."""
    return Line(check, "fail", found, remedy)


def worst(lines: Iterable[Line]) -> str:
    """The most serious status of all lines."""
    return max((line.status for line in lines), key=STATUSES.index, default="ok")
