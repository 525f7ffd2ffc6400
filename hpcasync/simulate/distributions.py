"""How long a worker computes one gradient: distributions of step times, by their text on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcasync.errors import UsageError, unknown
from hpcasync.simulate.units import seconds

KINDS = {
    "constant": "constant:MEAN",
    "exponential": "exponential:MEAN",
    "lognormal": "lognormal:MEAN,SIGMA",
    "gamma": "gamma:MEAN,SHAPE",
    "recorded": "recorded:FILE",
}
"""Every distribution with its form; MEAN in seconds, or with ms or us."""


@dataclass(frozen=True)
class Distribution:
    """Step times.

    Attributes:
        kind: one of ``KINDS``.
        mean: seconds.
        shape: sigma of the logarithm (lognormal), k (gamma), 0 otherwise.
        values: seconds that ``recorded`` draws from, with replacement.
    """

    kind: str
    mean: float
    shape: float = 0.0
    values: np.ndarray | None = None

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """``count`` step times, float64."""
        if self.kind == "exponential":
            return rng.exponential(self.mean, count)
        if self.kind == "lognormal":
            # mean is that of the times, not of their logarithms
            return rng.lognormal(math.log(self.mean) - self.shape**2 / 2, self.shape, count)
        if self.kind == "gamma":
            return rng.gamma(self.shape, self.mean / self.shape, count)
        if self.values is not None:
            return rng.choice(self.values, count)
        return np.full(count, self.mean)


def parse_distribution(text: str, flag: str = "--compute") -> Distribution:
    """The distribution that ``text`` describes, see ``KINDS``.

    Raises:
        UsageError: unknown, the wrong number of parameters, one out of range, a file without step times.
    """
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise unknown("distribution", kind, KINDS, f"{flag} is one of: {', '.join(KINDS.values())}.")
    parts = rest.split(",") if kind != "recorded" else [rest]
    if not colon or not rest or len(parts) != 1 + KINDS[kind].count(","):
        raise UsageError(f"{flag}: {text!r} has the wrong parameters; expected {KINDS[kind]}")
    if kind == "recorded":
        values = _recorded(Path(rest), flag)
        return Distribution(kind, float(values.mean()), values=values)
    mean = seconds(parts[0], flag, zero=kind == "constant")
    if len(parts) == 1:
        return Distribution(kind, mean)
    try:
        shape = float(parts[1])
    except ValueError:
        shape = math.nan
    if not math.isfinite(shape) or shape < 0 or (kind == "gamma" and shape == 0):
        raise UsageError(f"{flag}: {parts[1]!r} in {text!r}: expected a number {'> 0' if kind == 'gamma' else '>= 0'}")
    return Distribution(kind, mean, shape)


def _recorded(path: Path, flag: str) -> np.ndarray:
    """Step times of a text file (numbers apart by spaces, commas or lines), or of a run file (all ranks', or their means)."""
    if path.suffix in (".h5", ".hdf5") or path.is_dir():
        from hpcasync.simulate.like import read_like

        like = read_like(path if path.is_dir() else path.parent)
        return np.array(like.compute) if like.recording is None else np.concatenate(like.recording.steps)[:, 0]
    try:
        values = np.array([float(word) for word in path.read_text(encoding="utf-8").replace(",", " ").split()])
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}; expected a list of step seconds") from error
    except ValueError as error:
        raise UsageError(f"{flag}: {path}: {error}; expected a list of step seconds") from error
    if not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise UsageError(f"{flag}: {path} holds {values.size} numbers; expected step seconds, finite and >= 0")
    return values
