"""The process that draws the live view: ``python -m hpcasync.train.screen DESCRIPTOR FACTS``, started by rank 0.

A process of its own costs the ranks nothing but the core that it runs on, sees them also while rank 0 hangs, and gives the
terminal back when rank 0 is killed. It reads their rows from shared memory; it ends when its standard input does.

The view keeps the last lines of the terminal; what the ranks print, through mpiexec and at any time, scrolls above (a
scroll region, DECSTBM).
"""

from __future__ import annotations

import io
import json
import mmap
import os
import select
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from hpcasync.train.live_row import NBYTES, Row, State, living, mean_loss, middle, read_rows, slowest
from hpcasync.train.terminal import in_foreground

SECONDS = 0.5
"""Between two pictures."""
LEFT = 5
"""Lines of the terminal that stay for what scrolls, at least."""
NARROW = 64
"""On less columns than these there is one line, without the ranks."""
_WORDS = {State.STARTS: "starts", State.MEETS: "epoch's end", State.ENDED: "done", State.DIED: "died"}


@dataclass(frozen=True)
class Facts:
    """What does not change: the run's name, ranks, each rank's steps and epochs in all (0: not known), whose terminal it is."""

    title: str
    ranks: int
    steps: int
    epochs: int
    owner: int


class Region:
    """The last lines of a terminal.

    Args:
        descriptor: of the terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size, self._height = (0, 0), 0

    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal."""
        columns, lines = os.get_terminal_size(self._descriptor)
        return columns or 80, lines or 24

    def draw(self, picture: Sequence[str]) -> None:
        """Replace what is there by these lines, none of which may be wider than the terminal."""
        size, height = self.size(), len(picture)
        text = ""
        if size != self._size or height != self._height:
            text = self._clear() + self._reserve(size[1], height)
            self._size, self._height = size, height
        first = size[1] - height + 1
        lines = "".join(f"\x1b[{first + i};1H{line}\x1b[0m\x1b[K" for i, line in enumerate(picture))
        self._write(f"{text}\x1b7{lines}\x1b8")  # in one call: what others write comes before or after it

    def release(self) -> None:
        """Give the lines back."""
        if self._height:
            self._write(self._clear())
        self._size, self._height = (0, 0), 0

    def _clear(self) -> str:
        # Cursor and its colours are kept while the region is reset, which moves the cursor home.
        return "\x1b7\x1b[r\x1b8\x1b[J" if self._height else ""

    @staticmethod
    def _reserve(lines: int, height: int) -> str:
        return "\n" * height + f"\x1b[{height}A\x1b7\x1b[1;{lines - height}r\x1b8"

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._descriptor, data) :]


class Pace:
    """How long the rest of a run takes, from the steps since it was first seen."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def left(self, steps: float, total: int, now: float) -> str:
        """Time as h:mm:ss, a dash while it is not known."""
        if self._first is None and steps:
            self._first = now, steps
        if self._first is None or steps <= self._first[1]:
            return "-"
        seconds = round((total - steps) * (now - self._first[0]) / (steps - self._first[1]))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def picture(facts: Facts, rows: Sequence[Row], left: str, now: float, columns: int, lines: int) -> list[str]:
    """What to draw, as lines for a terminal with colours.

    Args:
        facts: of the run.
        rows: of all ranks.
        left: the time that it still takes.
        now: seconds of the monotonic clock.
        columns: of the terminal.
        lines: of the terminal.
    """
    slow, room = slowest(rows, now), lines - LEFT - 3
    parts: list[RenderableType] = [*_summary(facts, living(rows), left, slow)]
    if columns >= NARROW and room > 0:
        parts.append(_table(rows, slow, now, room))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns - 1, highlight=False, legacy_windows=False)
    for part in parts:
        console.print(part, no_wrap=True, overflow="ellipsis", crop=True)
    return out.getvalue().splitlines()


def _summary(facts: Facts, rows: Sequence[Row], left: str, slow: int | None) -> tuple[Text, Text]:
    steps, epoch = min(row.steps for row in rows), max(1, min(row.epoch for row in rows))
    place = f"epoch {epoch:.0f}" + (f"/{facts.epochs}" if facts.epochs else "")
    place += f"  {100 * steps / facts.steps:.0f} %  {left} left" if facts.steps else f"  step {steps:.0f}"
    stale = middle([row.staleness for row in rows]), max(row.staleness_max for row in rows)
    sums = f"loss {mean_loss(rows):.4f}  {sum(row.speed for row in rows):,.0f} samples/s  staleness {stale[0]:.0f}/{stale[1]:.0f}"
    if slow is not None:
        sums += f"  slowest: rank {slow}"
    return Text.assemble((facts.title, "bold"), f"  {place}"), Text(sums)


def _table(rows: Sequence[Row], slow: int | None, now: float, room: int) -> Table:
    """A row per rank; where there is no room for all, of the slowest."""
    shown = list(range(len(rows)))
    if len(rows) > room:
        shown.sort(key=lambda i: (i != slow, -rows[i].silence(now), rows[i].pace))
        shown = sorted(shown[: room - 1])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("rank", "step", "loss", "samples/s", "staleness", "compute", "comm.", "wait"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for i in shown:
        row = rows[i]
        silent, word = row.silence(now), _WORDS.get(State(int(row.state)), "slowest" if i == slow else "")
        note = f"silent {silent:.0f} s" if silent else word
        shares = [f"{100 * share:.0f} %" for share in (row.compute, row.communicate, row.wait)]
        cells = (f"{row.steps:.0f}", f"{row.loss:.4f}", f"{row.speed:,.0f}", f"{row.staleness:.0f}/{row.staleness_max:.0f}")
        table.add_row(str(i), *cells, *shares, note, style="red" if silent else "yellow" if i == slow else "")
    if len(shown) < len(rows):
        table.add_row("...", f"+{len(rows) - len(shown)}", style="dim")
    return table


def main(words: Sequence[str]) -> int:
    """Draw until the standard input ends, or the terminal is gone."""
    facts = Facts(**json.loads(words[1]))
    memory = mmap.mmap(int(words[0]), NBYTES * facts.ranks, prot=mmap.PROT_READ)
    region, pace = Region(sys.stdout.fileno()), Pace()
    try:
        while not select.select([sys.stdin], [], [], SECONDS)[0]:
            if not in_foreground(facts.owner):
                region.release()
                continue
            rows, now = read_rows(memory, range(facts.ranks)), time.monotonic()
            left = pace.left(min(row.steps for row in living(rows)), facts.steps, now)
            region.draw(picture(facts, rows, left, now, *region.size()))
        region.release()
    except OSError:  # the terminal is gone
        return 0
    except Exception:
        region.release()
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
