"""The file of a rank's record: valid at any time, whole after a kill, honest about a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcasync.errors import UsageError
from hpcasync.train.record_file import COUNTED, EVENT_ROW, STEP, STEP_ROW, RankFile, event_type, rank_path, read_rank, read_record

SIZES = {"events": 100_000, "steps": 100_000, "samples": 1_000_000, "hypers": 10}


def make(path: Path, **facts: object) -> RankFile:
    arrays = {"random": np.arange(9, dtype=np.uint8)}
    return RankFile(path, SIZES, {"rank": 0, "ranks": 1, "run": "x", **facts}, arrays, 3, (1, 4))


def fill(file: RankFile, rows: int) -> None:
    for i in range(rows):
        assert file.room(0, 1) and file.room(1, 1) and file.room(2, 2)
        EVENT_ROW.pack_into(file.event_bytes, file.events.itemsize * i, 1, 0, 7, i + 1, i + 1, i, i, i + 0.25, 0.125)
        file.versions[i] = (i, i + 1, -i - 1)
        STEP_ROW.pack_into(file.step_bytes, STEP_ROW.size * i, i, i + 0.5, 0.25, 0.125, 0.0625, 0, 1.5, 2, 2 * i)
        file.samples[2 * i : 2 * i + 2] = (i, i + 1)
        for which, count in enumerate((i + 1, i + 1, 2 * i + 2)):
            file.count(which, count)


def test_rows_are_what_the_schema_says(tmp_path: Path) -> None:
    assert EVENT_ROW.size + 8 * 3 == event_type(3).itemsize and STEP_ROW.size == STEP.itemsize
    path = rank_path(tmp_path, 0)
    file = make(path)
    fill(file, 50)
    assert os.stat(path).st_blocks * 512 < os.stat(path).st_size  # what is not used takes no disk
    for closed in (False, True):
        found = read_rank(path, 0)
        assert [len(getattr(found, name)) for name in COUNTED] == [50, 50, 100, 0]
        row = found.events[9]
        assert row["kind"] == 1 and row["digest"] == 7 and row["step"] == row["batch"] == 10 and row["clock"] == 9
        assert (row["begin"], row["end"], row["waited"]) == (9, 9.25, 0.125)
        assert found.versions[9].tolist() == [9, 10, 9] and found.before[9].tolist() == [8, 9, 8]
        step = found.steps[9]
        assert [float(step[n]) for n in STEP.names or ()] == [9, 9.5, 0.25, 0.125, 0.0625, 0, 1.5, 2, 18]
        assert found.indices(10).tolist() == [9, 10] and found.random.tolist() == list(range(9))
        assert found.closed is closed and bool(found.final) is closed
        if not closed:
            file.close({"final/w": np.ones(3)}, {"parameters_sha256": "abc"})
    assert found.end == {"parameters_sha256": "abc"} and os.stat(path).st_size < 1e5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_killed_writer_leaves_all_it_wrote(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.train.test_record_file import fill, make\n"
        "fill(make(Path(sys.argv[1])), 1234)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = rank_path(tmp_path, 0)
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=250, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    found = read_record(tmp_path)[0]
    assert len(found.events) == len(found.steps) == 1234 and not found.closed
    assert found.indices(1234).tolist() == [1233, 1234]


FULL = """
import os, sys
from pathlib import Path
from hpcasync.cli import main
from hpcasync.errors import UsageError
from hpcasync.train.record_file import read_rank
from tests.train.test_record_file import fill, make

path = Path("rank.h5")
file = make(path)
fill(file, 10)  # a block each for three arrays
try:
    Path("rest").write_bytes(bytes(1 << 24))
except OSError:
    pass
assert file.room(0, 1) and not file.room(0, 90_000)
try:
    file.close()
    sys.exit("closed on a full disk")
except UsageError as error:
    assert "the disk is full" in str(error)
assert len(read_rank(path, 0).events) == 10
try:
    make(Path("other.h5"))
    sys.exit("made on a full disk")
except UsageError as error:
    assert "can't write the record other.h5" in str(error)
file.leave()
path.unlink()
disk = os.statvfs(".")
Path("rest").unlink()
Path("rest").write_bytes(bytes(os.statvfs(".").f_bavail * disk.f_frsize - (200 << 10)))  # room for the run, not for its record
flags = "--epochs 1 --batch 2 --threads 1 --checkpoint-every 0 --record --output run"
sys.exit(main(["train", *flags.split()]))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount a small disk")
def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = "mount -t tmpfs -o size=14m none disk && cd disk && exec \"$0\" -c \"$1\""
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, FULL]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no room for more of the record") == 1 and "records: run" in done.stdout


def test_a_folder_that_is_away_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = rank_path(tmp_path / "run", 0)
    file = make(path)
    fill(file, 50)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(UsageError, match=r"cannot write .*rank-00000\.h5"):
        file.close()
    file.leave()
    found = read_rank(rank_path(tmp_path / "elsewhere", 0), 0)
    assert len(found.events) == 50 and found.closed


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rank.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "hpcasync-run"
    with pytest.raises(UsageError, match="'hpcasync-run', expected 'hpcasync-record'"):
        read_rank(path, 0)
    make(path)
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(UsageError, match="has format 2, this hpcasync reads 1"):
        read_rank(path, 0)
