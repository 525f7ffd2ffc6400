"""Live runs under mpiexec against the simulator that is fed with their records: samples/s, staleness, final accuracy.

Each case runs live with every seed, on 2 and on 4 ranks; ``hpcasync simulate --like`` then predicts it from that run's record
alone. ``error`` is the median over the seeds of predicted over live; ``next`` predicts the next seed's live run from this one's
record. Accuracies agree if Welch's t-test over the seeds does not tell them apart at 5 %. Runs on real processes and real
clocks: on a machine that does other things, the live side says little, so the load is in the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _data
import _runs
import numpy as np
from scipy.stats import ttest_ind

from hpcasync.comm import init
from hpcasync.data.atomic import replacing
from hpcasync.train.records import environment

CASES: dict[str, dict[str, Any]] = {
    "trend-smooth": {"rule": "trend-smooth", "lr": 0.1},
    "asgd": {"rule": "asgd", "lr": 0.05},
    "gsgm, shards:5": {"rule": "gsgm", "lr": 0.025, "momentum": 0.0, "partition": "shards:5"},
    "apam": {"rule": "apam", "lr": 0.001},
    "kstep, every 16": {"mode": "kstep", "rule": "plain", "lr": 0.05, "every": 16, "block_momentum": 0.5},
}
TOLERANCE = {"samples_per_second": 0.15, "staleness": 0.2}
SAMPLES, TEST_SAMPLES = 12_000, 2_000  # of MNIST, its first
HERE = Path(__file__).resolve().parent
COLUMNS = ("case", "ranks", "seed", "load", *(f"{s}_{k}" for k in (*TOLERANCE, "accuracy") for s in ("live", "simulated")))


def main() -> None:
    """Run what is missing, then write the table and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded digits, one epoch, one seed, two cases, 2 ranks")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "live")
    parser.add_argument("--seeds", type=int, help="from 0 on (default 5)")
    parser.add_argument("--ranks", type=int, nargs="+", help="default 2 and 4")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="only these")
    args = parser.parse_args()
    cases = args.cases or (["asgd", "gsgm, shards:5"] if args.quick else list(CASES))
    seeds = range(args.seeds or (1 if args.quick else 5))
    if args.quick:
        common: dict[str, Any] = {"data": "digits", "epochs": 1, "batch": 16}
    else:
        common = {"data": str(_data.cut("mnist", SAMPLES, TEST_SAMPLES)), "epochs": 2, "batch": 32}
    common |= {"model": "mlp", "threads": 1}
    runs = [
        _run(args.output / "runs", {**common, **CASES[case], "seed": seed}, case, ranks)
        for seed in seeds  # outermost, so that a drift of the machine hits all cases
        for ranks in args.ranks or ([2] if args.quick else [2, 4])
        for case in cases
    ]
    text, verdicts = _table(runs), _verdicts(runs)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(text + "\n\n" + "\n".join(f"- {v}" for v in verdicts) + "\n", encoding="utf-8")
    with open(args.output / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: run[k] for k in COLUMNS} for run in runs)
    print(f"{environment(init(mpi=False))}, {os.cpu_count()} cores\n\n{text}\n")
    print("\n".join(verdicts))


def _run(folder: Path, keys: dict[str, Any], case: str, ranks: int) -> dict[str, Any]:
    """One live run and its prediction; kept, and not run again."""
    path = folder / _runs.name_of({**keys, "ranks": ranks})
    done = path / "compared.json"
    if not done.exists():
        load = os.getloadavg()[0]
        live = _live(path / "live", keys, ranks)
        simulated = _simulated(path / "live", keys)
        row = {"case": case, "ranks": ranks, "seed": keys["seed"], "load": round(load, 1)}
        for side, result in (("live", live), ("simulated", simulated)):
            row[f"{side}_samples_per_second"] = result["samples_per_second"]
            row[f"{side}_staleness"] = result["staleness"]["mean"]
            row[f"{side}_accuracy"] = 100 * result["test_accuracy"]
        with replacing(done) as temporary:
            temporary.write_text(json.dumps(row))
    return dict(json.loads(done.read_text()))


def _live(folder: Path, keys: dict[str, Any], ranks: int) -> dict[str, Any]:
    if not (folder / "result.json").exists():
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in keys.items()]
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
        command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "hpcasync", "train", *flags, f"--output={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            sys.exit(done.stderr)
    return dict(json.loads((folder / "result.json").read_text()))


def _simulated(live: Path, keys: dict[str, Any]) -> dict[str, Any]:
    from hpcasync.simulate import make_simulate_config
    from hpcasync.simulate.run import simulate

    return simulate(make_simulate_config({**keys, "like": str(live)}), records=False, shown=False).result


def _errors(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Median over the seeds of predicted / live - 1: of the run that was recorded, and of the next seed's."""
    live, found = (np.array([row[f"{side}_{key}"] for row in rows]) for side in ("live", "simulated"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.median(found / live - 1)), float(np.median(found / np.roll(live, -1) - 1))


def _groups(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["case"], run["ranks"]), []).append(run)
    return groups


def _table(runs: Sequence[dict[str, Any]]) -> str:
    head = ("case", "ranks", "load", "samples/s live", "simulated", "error (next), %", "staleness live", "simulated")
    head += ("error (next), %", "accuracy live, %", "simulated, %")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (case, ranks), rows in _groups(runs).items():
        cells = [case, str(ranks), f"{np.median([r['load'] for r in rows]):.1f}"]
        for key, form in (("samples_per_second", ",.0f"), ("staleness", ".2f")):
            cells += [format(np.median([r[f"{side}_{key}"] for r in rows]), form) for side in ("live", "simulated")]
            error, further = _errors(rows, key)
            cells.append(f"{100 * error:+.1f} ({100 * further:+.1f})" if np.isfinite(error) else "-")
        for side in ("live", "simulated"):
            values = np.array([r[f"{side}_accuracy"] for r in rows])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1) if len(values) > 1 else 0:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdicts(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for (case, ranks), rows in _groups(runs).items():
        for key, most in TOLERANCE.items():
            error, _ = _errors(rows, key)
            if np.isfinite(error):  # the synchronous modes have no staleness
                verdict = "held" if abs(error) <= most else "NOT held"
                name = key.replace("_per_", "/").replace("samples/second", "samples/s")
                found.append(f"{verdict}: {case}, {ranks} ranks: {name} within {100 * most:.0f} % ({100 * error:+.1f} %)")
        live, simulated = ([row[f"{side}_accuracy"] for row in rows] for side in ("live", "simulated"))
        if len(rows) > 1:
            p = float(ttest_ind(live, simulated, equal_var=False).pvalue)
            verdict = "NOT held" if p < 0.05 else "held"
            found.append(f"{verdict}: {case}, {ranks} ranks: final accuracies agree (Welch's t-test, p = {p:.2f})")
    return found


if __name__ == "__main__":
    main()
