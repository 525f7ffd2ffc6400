"""Scaling on this machine: `hpcasync bench scaling` on 1, 2 and 4 ranks in turn, then its table; and with a straggler.

Every round launches each number of ranks once, so that drift of the machine hits all alike. --stragglers measures mode async
against sync with one rank --slow times slower (it sleeps after its gradient, so it takes no core from the others): `kept` is the
throughput over the sum of the ranks' own speeds, the samples per second of computing that each had. Target: async keeps 0.8.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _common import REPO, ROOT_OPENMPI, Spread, begin, make_parser

KEPT = 0.8
BENCH = [sys.executable, "-m", "hpcasync", "bench", "scaling"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1 2 4")
    parser.add_argument("--stragglers", action="store_true", help="the last rank is --slow times slower; default ranks: 2 4")
    parser.add_argument("--slow", type=float, default=4.0, help="default: 4")
    parser.add_argument("--out", type=Path, help="folder of the files (default: a temporary one)")
    parser.add_argument("more", nargs="*", help="-- and options of hpcasync bench scaling")
    args = parser.parse_args()
    about = begin("scaling")
    out = args.out or Path(tempfile.mkdtemp(prefix="hpcasync-scaling-"))
    out.mkdir(parents=True, exist_ok=True)
    usual = [2, 4] if args.stragglers else [1, 2, 4]
    ranks = args.ranks or (usual[: 1 if args.stragglers else 2] if args.quick else usual)
    words = ["--rounds", "1", "--out", str(out), *(["--seconds", "0.3"] if args.quick else []), *args.more]
    for _ in range(args.rounds or (1 if args.quick else 5)):
        for n in ranks:
            slow = ["--kinds", "weak", "--slow", f"{n - 1}:{args.slow:g}"] if args.stragglers else []
            scaling(n, [*words, *slow])
    rows = stragglers(out) if args.stragglers else []
    if not args.stragglers:
        subprocess.run([*BENCH, "--table", "--out", str(out)], check=True, env=_env())
    if args.json:
        found = {"benchmark": "scaling", "machine": about, "rows": rows, "folder": str(out)}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.out is None:
        shutil.rmtree(out)


def scaling(ranks: int, words: list[str]) -> None:
    """One launch."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [str(mpiexec) if mpiexec.exists() else "mpiexec", "-n", str(ranks), *BENCH, *words]
    done = subprocess.run(command, env=_env(), stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"bench scaling on {ranks} ranks ended with exit status {done.returncode}")


def stragglers(out: Path) -> list[dict[str, Any]]:
    """Print what is kept of the ranks' own speeds, with the speed that each rank had."""
    cases: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("ranks-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            cases.setdefault((row["ranks"], row["what"]), []).append(row)
    rows = []
    for (ranks, what), found in sorted(cases.items()):
        kept = Spread.of(np.array([row["samples_per_second"] / row["own"] for row in found]))
        own = np.median([row["by_rank"] for row in found], axis=0)
        target = f"  target {KEPT}: {'holds' if kept.median >= KEPT else 'MISSED'}" if what.startswith("async") else ""
        print(f"{ranks} ranks, {what:<20} kept {kept.show()}{target}   samples/s by rank: " + ", ".join(f"{s:,.0f}" for s in own))
        rows.append({"ranks": ranks, "what": what, "kept": kept.median, "q25": kept.q25, "q75": kept.q75})
    return rows


def _env() -> dict[str, str]:
    env = ROOT_OPENMPI | dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return env


if __name__ == "__main__":
    main()
