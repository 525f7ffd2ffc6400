"""The one error that means "the user's input is wrong": the CLI turns it into a single line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """The error for a name that is not in a registry, with the nearest known name.

    Args:
        kind: what was looked up, such as ``"rule"``.
        name: what the user wrote.
        known: the names that exist.
        hint: one more sentence for the end of the message.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    tail = f" {hint}" if hint else ""
    return UsageError(f"unknown {kind} {name!r}{guess} Known: {', '.join(names)}.{tail}")


@contextmanager
def damaged(what: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong in the block, which only reads a file, is the file's fault: a damaged one fails in many ways.

    Args:
        what: the file and what is wrong, such as ``"x.h5 cannot be read as HDF5"``.
        remedy: what to do.

    Raises:
        UsageError: in place of any other error.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):  # HDF5 says it in five lines
            reason = "No such file"
        raise UsageError(f"{what} ({reason}); {remedy}") from error
