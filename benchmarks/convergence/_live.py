"""Live runs of the recipes: the same keys under a real mpiexec, to set beside the simulated ones."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _pools
from _runs import Keys, name_of

SIMULATED_ONLY = ("workers", "compute")


def live(keys: Keys, folder: Path) -> dict[str, Any]:
    """The result (of ``--json``) of ``hpcasync train`` with these keys on ``workers`` ranks; kept in a file."""
    path = folder / f"live-{name_of(keys)}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    own = {k: v for k, v in keys.items() if k not in SIMULATED_ONLY}
    part = own.pop("pool", None)
    if part is not None:
        own["data"] = _pools.cut(own["data"], part, own["seed"])
    flags = [f for k, v in own.items() for f in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    launch = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(keys["workers"])]
    train = [*launch, sys.executable, "-m", "hpcasync", "train", *flags, "--json"]
    with tempfile.TemporaryDirectory() as output:
        done = subprocess.run([*train, "--output", output], capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result
