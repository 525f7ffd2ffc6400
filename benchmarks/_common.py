"""What the benchmarks share: the machine, starting ranks, interleaved timing, paired ratios, the report."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
ROOT_OPENMPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_osc": "^ucx"}
COPY_BYTES = 256 << 20  # moved by one np.copyto at most: far beyond the caches


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--rounds", type=int, help="how often the sides are timed in turn")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a rank: rows go to this file
    return parser


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import numba
    import torch

    try:
        from mpi4py import MPI

        library = MPI.Get_library_version().split("\n")[0].rstrip("\x00 ").strip()
    except (ImportError, RuntimeError) as error:
        library = f"none ({error})"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cores": cores,
        "cpu": names[0] if names else platform.processor(),
        "load": round(load, 2),
        "mpi": library,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


class Others:
    """The part of the machine's CPU time that others took, while the processes started inside ran and ended.

    Attributes:
        shares: of each time, in [0, 1].
    """

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __enter__(self) -> Others:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        whole, busy, own = (after - before for after, before in zip(self._now(), self._before, strict=True))
        self.shares.append(max(0.0, busy - own) / whole)

    def show(self) -> str:
        """For people."""
        middle, most = 100 * float(np.median(self.shares)), 100 * max(self.shares)
        return f"other work took {middle:.0f} % of the CPU time (median of {len(self.shares)} launches; at most {most:.0f} %)"

    def _now(self) -> tuple[float, float, float]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second, sum(os.times()[:4])


def launch(ranks: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run this script again on ``ranks`` ranks with one thread each; returns rank 0's rows."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = str(mpiexec) if mpiexec.exists() else shutil.which("mpiexec")
    if command is None:
        sys.exit(
            "no mpiexec beside python nor on PATH: pip install 'hpcasync[mpich]', or load the MPI module"
        )
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    flags = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version or "OpenRTE" in version else []
    env = ROOT_OPENMPI | dict(os.environ)
    env |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        worker = [sys.executable, "-u", sys.argv[0], "--worker", str(rows), *arguments]
        done = subprocess.run([command, *flags, "-n", str(ranks), *worker], env=env)
        if done.returncode:
            sys.exit(f"{Path(sys.argv[0]).name}: {ranks} ranks ended with exit status {done.returncode}")
        return list(json.loads(rows.read_text()))


def wide_mlp(width: int = 4096) -> tuple[Any, int, int]:
    """A perceptron of 25 M parameters (at the default width), its inputs and its classes."""
    from torch import nn

    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((1024, width, width, 1024)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), 1024, 1024


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    q25: float
    q75: float

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        return Spread(*(float(q) for q in np.quantile(values, (0.5, 0.25, 0.75))))

    def show(self, factor: float = 1.0, unit: str = "", digits: int = 2) -> str:
        m, lo, hi = (f"{factor * v:.{digits}f}" for v in (self.median, self.q25, self.q75))
        return f"{m:>9}{unit}  [{lo}, {hi}]"


def interleave(
    sides: Mapping[str, Callable[[], float]],
    rounds: int,
    meet: Callable[[], Any] | None = None,
    warm_up: int = 1,
) -> dict[str, np.ndarray]:
    """Time every side once a round, in alternating order, so that drift of the machine hits all alike.

    Args:
        sides: each does its work once and returns seconds.
        rounds: how often.
        meet: called before each side: the ranks' barrier.
        warm_up: rounds that are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            if meet is not None:
                meet()
            seconds = sides[name]()
            if turn >= 0:
                times[name].append(seconds)
    return {name: np.array(values) for name, values in times.items()}


def timed(work: Callable[[], Any], times: int = 1) -> Callable[[], float]:
    """A side that runs ``work`` ``times`` times and returns the seconds of one."""

    def side() -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    return side


def copy_of(nbytes: int) -> tuple[Callable[[], None], float]:
    """The limit: an ``np.copyto`` that reads and writes ``nbytes``, or a part of it if that is much.

    Returns:
        The copy, and the factor from its time to the time of ``nbytes``.
    """
    moved = min(nbytes, COPY_BYTES)
    source, target = np.ones(moved // 8, np.float32), np.ones(moved // 8, np.float32)
    return lambda: np.copyto(target, source), nbytes / moved


@dataclass(frozen=True)
class Ratio:
    """Time of ``side`` over time of ``to``, round by round, and what it should be at most."""

    side: str
    to: str
    target: float | None = None


class Report:
    """Prints cases as they come and keeps them as rows."""

    def __init__(self, quiet: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self._quiet = quiet

    def case(
        self,
        title: Mapping[str, Any],
        times: Mapping[str, np.ndarray],
        ratios: Sequence[Ratio],
        nbytes: Mapping[str, int] | None = None,
    ) -> None:
        """Add a case.

        Args:
            title: what it is: rule, parameters, ranks, ...
            times: seconds per round, by side.
            ratios: which sides to compare.
            nbytes: bytes that a side has to move, for its bandwidth.
        """
        row: dict[str, Any] = {**title, "seconds": {}, "ratios": []}
        lines = ["", ", ".join(f"{k} {v}" for k, v in title.items())]
        for side, values in times.items():
            spread = Spread.of(values)
            row["seconds"][side] = {**asdict(spread), "rounds": len(values)}
            moved = (nbytes or {}).get(side)
            rate = f"  {moved / spread.median / 1e9:6.1f} GB/s" if moved else ""
            lines.append(f"  {side:<34}{spread.show(1e3, ' ms', 3)}{rate}")
        for ratio in ratios:
            spread = Spread.of(times[ratio.side] / times[ratio.to])
            holds = None if ratio.target is None else spread.median <= ratio.target
            row["ratios"].append({**asdict(ratio), **asdict(spread), "holds": holds})
            verdict = "" if holds is None else f"  target {ratio.target}: {'holds' if holds else 'MISSED'}"
            lines.append(f"  {f'{ratio.side} / {ratio.to}':<52}{spread.show()}{verdict}")
        self.rows.append(row)
        if not self._quiet:
            print("\n".join(lines), flush=True)


def begin(name: str) -> dict[str, Any]:
    """Print what is measured on which machine."""
    about = machine()
    print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    return about


def finish(
    args: argparse.Namespace, name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print how many targets hold; write the JSON file if one was asked for."""
    targets = [r for row in rows for r in row["ratios"] if r["holds"] is not None]
    print(f"\n{name}: {sum(r['holds'] for r in targets)} of {len(targets)} targets hold", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"benchmark": name, "machine": about, "rows": rows}, indent=1) + "\n")
