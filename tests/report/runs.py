"""Runs to report on."""

from __future__ import annotations

from pathlib import Path

from hpcasync.cli import main


def simulate(folder: Path, *words: str) -> Path:
    """A short simulated run."""
    common = ["simulate", "--data", "digits", "--epochs", "2", "--batch", "64"]
    assert main([*common, *words, "--output", str(folder)]) == 0
    return folder
