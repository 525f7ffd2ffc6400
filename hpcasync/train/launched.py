"""What `hpcasync launch` and its ranks tell each other. Only the standard library here."""

from __future__ import annotations

import os
from pathlib import Path

SURVIVE = "HPCASYNC_SURVIVE"
"""Set where ranks may die without ending the job."""
RESTARTED = "HPCASYNC_RESTARTED"
"""Set where a job was started again after a death."""
FOLDER = "HPCASYNC_LAUNCH_FOLDER"
"""Where ranks leave word: each its exit code, rank 0 that the others may die from now on."""
TRAINING = "training"


def survives() -> bool:
    """Whether this job was started to outlive ranks."""
    return bool(os.environ.get(SURVIVE))


def restarted() -> bool:
    """Whether this job goes on after a death, with the words of the first one."""
    return bool(os.environ.get(RESTARTED))


def now_training() -> None:
    """Tell the launcher that the job goes on without a rank that dies from now on."""
    (Path(os.environ[FOLDER]) / TRAINING).touch()
