"""Whatever a file holds, reading it ends in a value or in one clear error: no crash, no hang, nothing executed.

``HPCASYNC_FUZZ=5000`` (examples per kind) and ``HPCASYNC_FUZZ_SEED`` look further than the suite does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS
from tests.mpi import REPO

EXAMPLES = os.environ.get("HPCASYNC_FUZZ", "120")
SEED = os.environ.get("HPCASYNC_FUZZ_SEED", "1")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", READERS)
def test_any_bytes_give_a_value_or_one_clear_error(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.child", kind, str(tmp_path), EXAMPLES, SEED]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"{done.returncode}: the last file is in {tmp_path}\n{done.stdout}\n{done.stderr[-6000:]}"
    assert "read all" in done.stdout
    assert not (tmp_path / "EXECUTED").exists()
