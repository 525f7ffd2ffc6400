"""Read what docstrings say: the one source of the help texts of options."""

from __future__ import annotations

import inspect
import re
from typing import Any

_ENTRY = re.compile(r"^    ([a-z_][\w, ]*?)(?: \([^)]*\))?: (.*)$")


def first_line(thing: Any) -> str:
    """The first sentence of the docstring, in plain text; empty without one."""
    paragraph = _text(thing).split("\n\n")[0].replace("\n", " ")
    return _plain(re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0])


def section(thing: Any, title: str) -> dict[str, str]:
    """The entries of a Google-style section such as ``Attributes`` or ``Args``, in their order.

    Args:
        thing: a class, function or module; only its own docstring is read.
        title: of the section, without the colon.
    """
    entries: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in _text(thing).split("\n"):
        if not line.startswith(" "):
            # Blank lines inside a section are allowed, the next unindented line ends it.
            inside = line == f"{title}:" or (inside and not line)
            continue
        if not inside:
            continue
        found = _ENTRY.match(line)
        if found:
            names = found.group(1).split(", ")
            entries.update(dict.fromkeys(names, found.group(2)))
        else:
            entries.update({n: f"{entries[n]} {line.strip()}" for n in names})
    return {name: _plain(text) for name, text in entries.items()}


def attributes_of(cls: type) -> dict[str, str]:
    """The ``Attributes`` of a class and of those it inherits from; the nearest class that names one explains it."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if "__doc__" in vars(parent):
            found |= section(parent, "Attributes")
    return found


def source_of(thing: Any) -> str:
    """What follows ``Source:`` in the docstring, in one line; empty without it."""
    found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", _text(thing), re.M | re.S)
    return _plain(found.group(1).replace("\n", " ")) if found else ""


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").split()).rstrip(".")
