"""What `hpcasync launch` and its ranks tell each other. Only the standard library here."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SURVIVE = "HPCASYNC_SURVIVE"
"""Set where ranks may die without ending the job."""
RESTARTED = "HPCASYNC_RESTARTED"
"""Set where a job was started again after a death: who has died so far, in JSON."""
FOLDER = "HPCASYNC_LAUNCH_FOLDER"
"""Where ranks leave word: each its exit code, rank 0 that the others may die from now on, and who has died."""
TRAINING = "training"
DEATH = "death-"
ABORTED = "aborted"

Death = dict[str, Any]
"""Of a rank that was killed or hung: ``rank`` (its number in that start of the job), ``time`` (seconds since 1970), ``samples``,
``updates`` of its own (0 where others count them), ``shards`` whose lock it held; where known ``epoch``, ``step``,
``recorded`` (the step in its record), ``cause``."""


def survives() -> bool:
    """Whether this job was started to outlive ranks."""
    return bool(os.environ.get(SURVIVE))


def restarted() -> bool:
    """Whether this job goes on after a death, with the words of the first one."""
    return bool(os.environ.get(RESTARTED))


def now_training() -> None:
    """Tell the launcher that the job goes on without a rank that dies from now on."""
    (Path(os.environ[FOLDER]) / TRAINING).touch()


def note_abort(code: int) -> None:
    """Tell the launcher, if there is one, that the whole job ends now with this code; the first one counts."""
    folder = os.environ.get(FOLDER)
    if folder:
        with contextlib.suppress(OSError), open(Path(folder) / ABORTED, "x") as file:
            file.write(str(code))


def aborted_with(folder: Path) -> int | None:
    """What was noted there; None if nothing was."""
    try:
        return int((folder / ABORTED).read_text())
    except (OSError, ValueError):
        return None


def death(rank: int, when: float, cause: str) -> Death:
    """Of a rank of which no more is known, or whose work the checkpoint counts."""
    return {"rank": rank, "time": when, "samples": 0, "updates": 0, "shards": [], "cause": cause}


def note_death(of: Death) -> None:
    """Tell the launcher, if there is one, who has died."""
    folder = os.environ.get(FOLDER)
    if folder:
        with contextlib.suppress(OSError):  # full or gone: the wrappers' word is left
            page = Path(folder) / f"{DEATH}{of['rank']}"
            page.with_suffix(".tmp").write_text(json.dumps(of))
            page.with_suffix(".tmp").rename(page)


def place_of(of: Death) -> str:
    """Where a rank died, in words; steps of a record count from the run's begin, as those of `replay --inspect` do."""
    recorded = f" (step {of['recorded']} of its record)" if of.get("recorded") else ""
    return f"epoch {of['epoch']}, step {of['step']}{recorded}"


def note_hung(ranks: Iterable[int]) -> None:
    """Tell the launcher which ranks hang, for which the job ends."""
    for rank in ranks:
        note_death(death(rank, time.time(), "hung"))


def noted_deaths(folder: Path) -> list[Death]:
    """What was noted there, as far as it can be read."""
    found = []
    for page in folder.glob(f"{DEATH}*"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            of = json.loads(page.read_text())
            time.localtime(of["time"])
            if not page.suffix and isinstance(of["rank"], int) and isinstance(of["shards"], list):
                found.append(of)
    return found


def earlier_deaths(known: list[Death]) -> list[Death]:
    """``known`` of the checkpoint, and those of earlier starts that it does not know: it is older, and counts their work."""
    told: list[Death] = json.loads(os.environ.get(RESTARTED, "[]"))
    there = {(of["rank"], of["time"]) for of in known}
    unknown = [of for of in told if (of["rank"], of["time"]) not in there]
    return known + [death(of["rank"], of["time"], of.get("cause", "died")) for of in unknown]
