"""What a run shows while it runs: a bar on a terminal, plain lines elsewhere, only on rank 0; the live view where asked for."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from hpcasync.train.monitor import Monitor

PLAIN_SECONDS = 10.0
"""Seconds between plain lines inside an epoch."""


class Progress:
    """Progress of a run.

    Args:
        epochs: in all.
        steps: per epoch.
        shown: false on all ranks but 0.
        stream: where to; the standard error, so that standard output stays for results.
        monitor: told of everything, and closed with this one. With its live view there is no bar and no line between evaluations.
    """

    def __init__(
        self, epochs: int, steps: int, *, shown: bool, stream: TextIO | None = None, monitor: Monitor | None = None
    ) -> None:
        self._epochs, self._steps, self._shown = epochs, steps, shown
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()
        self._monitor = monitor
        self._live = monitor is not None and monitor.shown

    def __enter__(self) -> Progress:
        if self._shown and not self._live and self._stream.isatty():
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
        if self._monitor is not None:
            self._monitor.__exit__(kind, error, trace)

    def resumed(self, steps: int, gone: float) -> None:
        """Tell that so many steps were made before, and updates by ranks that have died. Collective with a monitor."""
        if self._monitor is not None:
            self._monitor.resumed(steps, gone)
        if self._bar is not None:
            self._bar.update(self._task, completed=steps)

    def dealt(self, steps: int, done: int) -> None:
        """Tell that an epoch has another number of steps from now on, of which so many are done."""
        self._steps = steps
        if self._bar is not None:
            self._bar.update(self._task, total=self._epochs * steps, completed=done)

    def step(self, epoch: int, step: int, loss: float, samples: int = 0) -> None:
        """Tell of step ``step`` (from 1) of epoch ``epoch`` (from 1), on ``samples``, for a monitor."""
        if self._monitor is not None:
            self._monitor.step(loss, samples, epoch)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=f"epoch {epoch} loss {loss:.3f}")
        elif self._shown and not self._live and time.monotonic() - self._last > PLAIN_SECONDS:
            self._say(f"epoch {epoch}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}")

    def meets(self) -> None:
        """Tell that this rank has come to the end of an epoch."""
        if self._monitor is not None:
            self._monitor.meets()

    def died(self, rank: int, updates: int) -> None:
        """Tell of a rank that has died after so many updates, by its number at the start."""
        if self._monitor is not None:
            self._monitor.died(rank, updates)

    def evaluated(self, row: dict[str, float], speed: float) -> None:
        """Tell of an evaluation."""
        if self._monitor is not None:
            curves = {"loss/train": row["train_loss"], "loss/test": row["test_loss"], "accuracy/test": row["test_accuracy"]}
            self._monitor.scalars(curves | {"epoch": row["epoch"]}, row["updates"])
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
