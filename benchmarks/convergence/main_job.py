"""The README's numbers: LeNet-5 on Fashion-MNIST, 4 ranks, each mode over several seeds, as a Markdown table.

Needs the real data where HPCASYNC_DATA points (or in the cache). Compares the modes with each other; the accuracies are
means and standard deviations over the seeds, at the defaults of the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hpcasync.comm import init
from hpcasync.train.records import environment

MODES = {
    "async": "--mode async --rule trend-smooth --base momentum",
    "sync": "--mode sync --base momentum",
    "kstep": "--mode kstep --every 16 --block-momentum 0.5 --base momentum",
}


def main() -> None:
    """Run every mode with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded digits, one epoch, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    data = "--data digits --model mlp --epochs 1" if args.quick else "--data fashion-mnist --model lenet5 --epochs 3"
    seeds = range(1 if args.quick else args.seeds)
    print(f"main_job: {environment(init(mpi=False))}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| mode | test accuracy, % | test loss | samples/s | staleness 50 % / 95 % | compute / communicate / wait, % |")
    print("|---|---|---|---|---|---|")
    for flags in MODES.values():
        runs = [_run(args.ranks, f"{data} {flags} --seed {seed}") for seed in seeds]
        accuracy = 100 * np.array([r["test_accuracy"] for r in runs])
        loss = np.array([r["test_loss"] for r in runs])
        speed = np.median([r["samples_per_second"] for r in runs])
        stale = [np.median([r["staleness"][q] for r in runs]) for q in ("p50", "p95")]
        share = [100 * np.mean([r["share"][k] for r in runs]) for k in ("compute", "communicate", "wait")]
        deviation = accuracy.std(ddof=1) if len(runs) > 1 else 0.0
        cells = (
            f"`{flags}`",
            f"{accuracy.mean():.2f} ± {deviation:.2f}",
            f"{loss.mean():.3f}",
            f"{speed:,.0f}",
            f"{stale[0]:.0f} / {stale[1]:.0f}",
            " / ".join(f"{s:.0f}" for s in share),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _run(ranks: int, flags: str) -> dict:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as folder:
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        train = [sys.executable, "-m", "hpcasync", "train", *flags.split(), "--json", "--output", folder]
        done = subprocess.run([mpiexec, "-n", str(ranks), *train], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        result: dict = json.loads(done.stdout.rstrip("\n").split("\n")[-1])  # type: ignore[type-arg]
        return result


if __name__ == "__main__":
    main()
