"""Scaling on this machine: `hpcasync bench scaling` on 1, 2 and 4 ranks in turn, then its table; and with a straggler.

Every round launches each number of ranks once, so that drift of the machine hits all alike. --hosts 2x1 4x1 adds launches on so
many separate hosts (network namespaces behind links of 1 Gbit/s, tests/hosts.py; needs root) with so many ranks each.

--stragglers measures mode async against sync with one rank --slow times slower (it sleeps after its gradient, so it takes no core
from the others): `kept` is the throughput over the sum of the ranks' own speeds, the samples per second of computing that each
had in that run beside the others. Target: async keeps 0.8. `of lone ranks`: over what they would do with a core each, which is
the speed of one alone times the ranks, the slow one at its part; ranks that share cores can't come near 1.
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
from _common import REPO, ROOT_OPENMPI, Others, Spread, begin, make_parser

KEPT = 0.8
BENCH = [sys.executable, "-m", "hpcasync", "bench", "scaling"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1 2 4")
    parser.add_argument("--hosts", nargs="+", default=[], metavar="HOSTSxRANKS", help="launches on separate hosts")
    parser.add_argument("--stragglers", action="store_true", help="the last rank is --slow times slower; default ranks: 2 4")
    parser.add_argument("--slow", type=float, default=4.0, help="default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of the first round's trainings (--target)")
    parser.add_argument("--out", type=Path, help="folder of the files (default: a temporary one)")
    parser.add_argument("more", nargs="*", help="-- and options of hpcasync bench scaling")
    args = parser.parse_args()
    about = begin("scaling")
    out = args.out or Path(tempfile.mkdtemp(prefix="hpcasync-scaling-"))
    out.mkdir(parents=True, exist_ok=True)
    usual = [2, 4] if args.stragglers else [1, 2, 4]
    ranks = args.ranks or (usual[: 1 if args.stragglers else 2] if args.quick else usual)
    words = ["--rounds", "1", "--out", str(out), *(["--seconds", "0.3"] if args.quick else []), *args.more]
    others = Others()
    for turn in range(args.rounds or (1 if args.quick else 5)):
        seed = ["--seed", str(args.seed + turn)]
        for n in [1, *ranks] if args.stragglers else ranks:
            slow = ["--slow", f"{n - 1}:{args.slow:g}"] if n > 1 else ["--what", "sync"]  # for the base
            with others:
                scaling(n, [*words, *seed, *(["--kinds", "weak", *slow] if args.stragglers else [])])
        for pair in args.hosts:
            with others:
                scaling_on_hosts(*map(int, pair.split("x")), [*words, *seed])
    print(others.show(), flush=True)
    rows = stragglers(out, args.slow) if args.stragglers else []
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


def scaling_on_hosts(hosts: int, ranks: int, words: list[str]) -> None:
    """One launch on hosts of their own."""
    sys.path.insert(0, str(REPO))
    from tests.hosts import Hosts, HostsRun
    from tests.mpi import require_lane

    with Hosts(hosts) as there, tempfile.TemporaryDirectory() as folder:
        run = HostsRun(require_lane("mpich"), Path(folder), there)
        run.cli(["bench", "scaling", *words], hosts * ranks, timeout=600, cwd=Path.cwd())


def stragglers(out: Path, slow: float) -> list[dict[str, Any]]:
    """Print what is kept of the ranks' own speeds, with the speed that each rank had."""
    cases: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("ranks-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            cases.setdefault((row["ranks"], row["what"]), []).append(row)
    rows = []
    alone = float(np.median([row["samples_per_second"] for row in cases.pop((1, "torch"))]))
    for (ranks, what), found in sorted((key, found) for key, found in cases.items() if key[0] > 1):
        lone = Spread.of(np.array([row["samples_per_second"] for row in found]) / alone / (ranks - 1 + 1 / slow))
        kept = Spread.of(np.array([row["samples_per_second"] / row["own"] for row in found]))
        own = np.median([row["by_rank"] for row in found], axis=0)
        target = f"  target {KEPT}: {'holds' if kept.median >= KEPT else 'MISSED'}" if what.startswith("async") else ""
        speeds = ", ".join(f"{s:,.0f}" for s in own)
        print(f"{ranks} ranks, {what:<20} kept {kept.show()}{target}   of lone ranks {lone.show()}   samples/s by rank: {speeds}")
        rows.append({"ranks": ranks, "what": what, "kept": kept.median, "q25": kept.q25, "q75": kept.q75, "lone": lone.median})
    return rows


def _env() -> dict[str, str]:
    env = ROOT_OPENMPI | dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return env


if __name__ == "__main__":
    main()
