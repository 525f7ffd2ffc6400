"""Numbers with units, as flags write them: ``5us``, ``10GB/s``."""

from __future__ import annotations

import math
import re

from hpcasync.errors import UsageError

_PER_SECOND = {"": 1.0, "s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9}
_PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"([0-9.]+(?:[eE][-+]?[0-9]+)?)"


def seconds(text: str, flag: str, *, zero: bool = True) -> float:
    """``text`` such as ``"1.5"``, ``"20ms"`` or ``"5us"`` in seconds.

    Args:
        text: a number with an optional unit: s, ms, us, ns.
        flag: for the message.
        zero: whether 0 is allowed.

    Raises:
        UsageError: it is no such number, or negative.
    """
    match = re.fullmatch(_NUMBER + r"\s*([a-zµ]*)", text.strip())
    try:
        value = float(match[1]) / _PER_SECOND[match[2]] if match else math.nan
    except (KeyError, ValueError):
        value = math.nan
    if not math.isfinite(value) or (value == 0 and not zero):
        least = ">= 0" if zero else "> 0"
        raise UsageError(f"{flag}: {text!r} is no time; expected a number {least} with s, ms or us, such as 1.5 or 20ms")
    return value


def bytes_per_second(text: str, flag: str) -> float:
    """``text`` such as ``"10GB/s"`` or ``"25Gbit/s"`` in bytes per second; ``"inf"`` has no limit.

    Raises:
        UsageError: it is no such number, or not above 0.
    """
    if text.strip() == "inf":
        return math.inf
    match = re.fullmatch(_NUMBER + r"\s*([KMGT]?)(B|bit)(?:/s)?", text.strip())
    try:
        value = float(match[1]) * _PREFIX[match[2]] / (8 if match[3] == "bit" else 1) if match else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{flag}: {text!r} is no bandwidth; expected a number > 0 with a unit, such as 10GB/s or 25Gbit/s")
    return value
