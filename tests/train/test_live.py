"""``train --live`` on real terminals: what the screen shows while ranks train, stop, and are killed; and the pictures alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcasync.train.board import Board
from hpcasync.train.live_row import Row, State, slowest
from hpcasync.train.screen import Facts, Pace, picture
from tests.mpi import TOKEN, MpiRun, processes_of
from tests.terminal import Terminal

pytestmark = pytest.mark.timeout(600)  # screens that are waited for on a machine that may be busy
RANK = re.compile(r"^ *(\d+) +(\d+) +([\d.]+) +([\d,]+) +(\d+)/(\d+) +(\d+) % +(\d+) % +(\d+) % *(.*)$")
TRAIN = ["train", "--live", "--epochs", "100000", "--batch", "1", "--lr", "0.001", "--checkpoint-every", "0", "--output"]


def terminal(mpirun: MpiRun, words: Sequence[str], n: int | None, **size: int) -> Terminal:
    """A command of hpcasync on a terminal, under mpiexec for ``n`` ranks."""
    token = mpirun.last_token = uuid.uuid4().hex
    command = [*mpirun.lane.cli, *words]
    if n is not None:
        command = mpirun._command(command, n, ())
    return Terminal(command, mpirun._environment({TOKEN: token}), token, mpirun.folder, **size)


def ranks_of(lines: list[str]) -> dict[int, re.Match[str]]:
    """The rows that the screen shows."""
    return {int(found[1]): found for line in lines if (found := RANK.match(line))}


def note(lines: list[str], rank: int) -> str:
    """What the screen says beside a rank."""
    rows = ranks_of(lines)
    return rows[rank][10] if rank in rows else ""


def process_of(token: str, rank: int) -> int:
    """The process id of a rank."""
    words = {f"{name}={rank}".encode() for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")}
    found = [
        pid
        for pid in processes_of(token)
        if words & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        and Path(f"/proc/{pid}/comm").read_text().strip() != "sh"  # the wrapper of launch
        and b"hpcasync.train.screen" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return min(found)


def test_all_ranks_on_the_terminal_of_mpiexec(mpirun: MpiRun) -> None:
    with terminal(mpirun, [*TRAIN, "run", "--slow", "1:5"], 4) as shown:
        lines = shown.wait_for(lambda lines: [int(row[2]) > 50 for row in ranks_of(lines).values()] == [True] * 4)
        for row in ranks_of(lines).values():
            assert 0 < float(row[3]) < 10 and int(row[4].replace(",", "")) > 0
            assert int(row[5]) <= int(row[6])
            assert abs(sum(int(row[i]) for i in (7, 8, 9)) - 100) <= 2
        lines = shown.wait_for(lambda lines: note(lines, 1) == "slowest")
        assert sum("slowest" in row[10] for row in ranks_of(lines).values()) == 1
        assert any(re.match(r"digits-mlp-async  epoch \d+/100000  \d+ %", line) for line in lines)
        stopped = process_of(mpirun.last_token, 1)
        for _ in range(12):  # it may be stopped just between two epochs, where it has nothing to tell
            os.kill(stopped, signal.SIGSTOP)
            shown.read(6)
            lines = shown.lines
            os.kill(stopped, signal.SIGCONT)
            if "silent" in note(lines, 1):
                break
            shown.read(1)
        assert any(line.endswith("slowest: rank 1") for line in lines)
        shown.wait_for(lambda lines: "silent" not in note(lines, 1))
        # What ranks print meanwhile scrolls above: no evaluation is lost.
        metrics = mpirun.folder / "run" / "metrics.jsonl"
        shown.wait_for(lambda _: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
        told = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
        shown.wait_for(lambda lines: f"epoch {told[-1]}/100000" in "\n".join([*shown.past, *lines]))
        os.kill(process_of(mpirun.last_token, 3), signal.SIGTERM)  # all save and leave, with exit code 75
        shown.wait()
        assert not ranks_of(shown.lines), "the lines of the view are given back"
        text = "\n".join([*shown.past, *shown.lines])
        assert [epoch for epoch in told if f"epoch {epoch}/100000" not in text] == []
        assert "stopped by SIGTERM" in text


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # the terminal's side is the same with both
def test_killed_ranks(mpirun: MpiRun) -> None:
    with terminal(mpirun, ["launch", "-n", "3", "--survive", "--", *TRAIN, "run"], None) as shown:
        lines = shown.wait_for(lambda lines: len(ranks_of(lines)) == 3 and int(ranks_of(lines)[2][2]) > 0)
        os.kill(process_of(mpirun.last_token, 2), signal.SIGKILL)
        lines = shown.wait_for(lambda lines: note(lines, 2) == "died")
        steps = int(ranks_of(lines)[1][2])
        shown.wait_for(lambda lines: 1 in ranks_of(lines) and int(ranks_of(lines)[1][2]) > steps + 50)
        # The terminal is given back also when rank 0 is killed.
        os.kill(json.loads((mpirun.folder / "run" / "run.lock").read_text())["pid"], signal.SIGKILL)
        assert shown.wait() != 0
        assert not ranks_of(shown.lines) and shown.screen.margins is None
        regions = re.findall(rb"\x1b\[(\d*;?\d*)r", shown.seen)
        assert regions[-1] == b""


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_one_process_and_other_sizes_of_the_terminal(mpirun: MpiRun) -> None:
    with terminal(mpirun, [*TRAIN, "run", "--mode", "sync"], None, columns=80, lines=24) as shown:
        shown.wait_for(lambda lines: list(ranks_of(lines)) == [0])
        shown.resize(60, 24)
        shown.wait_for(lambda lines: not ranks_of(lines) and any("samples/s" in line for line in lines[-2:]))
        shown.resize(80, 12)
        shown.wait_for(lambda lines: ranks_of(lines[-1:]))
        os.kill(shown.process.pid, signal.SIGTERM)
        assert shown.wait() == 75


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_nothing_is_drawn_from_the_background(mpirun: MpiRun) -> None:
    job = f"set -m; {shlex.join([*mpirun.lane.cli, *TRAIN, 'run'])} & read; fg"
    token = mpirun.last_token = uuid.uuid4().hex
    with Terminal(["bash", "-c", job], mpirun._environment({TOKEN: token}), token, mpirun.folder) as shown:
        shown.wait_for(lambda lines: sum("accuracy" in line for line in lines) > 1)
        shown.read(1)
        assert not ranks_of(shown.lines) and b"\x1b7" not in shown.seen
        shown.type("\n")
        shown.wait_for(ranks_of)
        os.kill(json.loads((mpirun.folder / "run" / "run.lock").read_text())["pid"], signal.SIGTERM)
        shown.wait()
        assert not ranks_of(shown.lines)


def row(**values: float) -> Row:
    return Row(**{"time": 100.0, "state": State.TRAINS, "speed": 10.0, "pause": 0.01, **values})  # type: ignore[arg-type]


def test_who_is_slowest() -> None:
    assert slowest([row()], 100) is None
    assert slowest([row(speed=10), row(speed=9), row(speed=11)], 100) == 1
    # In step all have one speed: the one that the others wait for waits least.
    assert slowest([row(wait=0.6), row(wait=0.1), row(wait=0.5)], 100) == 1
    assert slowest([row(), row(time=95.0), row(time=90.0, pause=4.0)], 100) == 1  # the third makes a step in 4 seconds
    assert slowest([row(state=State.STARTS, speed=0, time=0), row()], 100) is None


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (64, 10), (40, 24), (10, 3), (200, 60)])
def test_pictures_fit_the_terminal(columns: int, lines: int) -> None:
    rows = [row(steps=10 * i, loss=1234.5, speed=1e6 + i, staleness=400, staleness_max=999) for i in range(40)]
    rows[7] = row(speed=1e6, time=1.0)
    drawn = picture(Facts("a" * 30, 40, 1000, 3, 1), rows, "-", 100.0, columns, lines)
    found = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in drawn]
    assert len(found) <= max(2, lines - 5) and all(len(line) < columns for line in found)
    if columns >= 64 and lines > 9:
        assert any(line.split()[0] == "7" and "silent" in line for line in found[3:])  # whoever is left out, not this one
    if (columns, lines) == (80, 24):
        assert found[-1].split() == ["...", "+25"]


def test_a_dead_rank_is_told_and_holds_up_nobody() -> None:
    rows = [row(steps=50), row(steps=60, speed=9.0), row(state=State.DIED, time=1.0, steps=5, speed=0.0)]
    assert slowest(rows, 100) == 1
    drawn = picture(Facts("a", 3, 100, 3, 1), rows, "-", 100.0, 100, 24)
    assert "50 %" in drawn[0] and "died" in drawn[-1] and "slowest" in drawn[-2]


def test_time_left() -> None:
    pace = Pace()
    assert pace.left(0, 100, 0.0) == "-" and pace.left(10, 100, 1.0) == "-"
    assert pace.left(20, 100, 11.0) == "0:01:20"


def test_a_board_of_one_process_holds_its_row() -> None:
    import hpcasync

    board = Board(hpcasync.init(mpi=False))
    board.write(row(loss=0.5))
    assert board.read() == [row(loss=0.5)]
    board.bury(0)
    assert board.read() == [row(loss=0.5, state=State.DIED, speed=0.0)]
    board.close()
