"""What a run shows while it runs: a bar on a terminal, plain lines elsewhere, and only on rank 0."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

PLAIN_SECONDS = 10.0
"""Seconds between plain lines inside an epoch."""


class Progress:
    """Progress of a run.

    Args:
        epochs: in all.
        steps: per epoch.
        shown: false on all ranks but 0.
        stream: where to; the standard error, so that standard output stays for results.
    """

    def __init__(self, epochs: int, steps: int, *, shown: bool, stream: TextIO | None = None) -> None:
        self._epochs, self._steps, self._shown = epochs, steps, shown
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self._shown and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(file=self._stream))
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._epochs * self._steps, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resumed(self, steps: int) -> None:
        """Tell that so many steps were made before."""
        if self._bar is not None:
            self._bar.update(self._task, completed=steps)

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Tell of step ``step`` (from 1) of epoch ``epoch`` (from 1)."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=f"epoch {epoch} loss {loss:.3f}")
        elif self._shown and time.monotonic() - self._last > PLAIN_SECONDS:
            self._say(f"epoch {epoch}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}")

    def evaluated(self, row: dict[str, float], speed: float) -> None:
        """Tell of an evaluation."""
        if not self._shown:
            return
        text = (
            f"epoch {row['epoch']:.0f}/{self._epochs}  loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
            f"accuracy {100 * row['test_accuracy']:.2f} %  {speed:,.0f} samples/s"
        )
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=self._stream, flush=True)
