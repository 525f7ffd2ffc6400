"""What a run goes on from when its job is started again."""

from __future__ import annotations

from pathlib import Path

from hpcasync.train.checkpoint_folder import checkpoints


class Resume:
    """Made before the first start.

    Args:
        folder: of the run.
        asked: what the user wants the first start to go on from, ``--resume``.
    """

    def __init__(self, folder: Path, asked: str | None) -> None:
        self._folder, self._asked = folder, asked
        self._before = checkpoints(folder)[-1:]

    def flags(self) -> list[str]:
        """More flags of `train` for the next start: the newest checkpoint, unless the user's is still the one to go on from."""
        if self._asked is not None and checkpoints(self._folder)[-1:] == self._before:
            return []
        return ["--resume", "auto"]
