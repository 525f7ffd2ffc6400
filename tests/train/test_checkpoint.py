"""The checkpoint's file, tree, folder and lock: damage is always found, a full disk loses nothing, one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcasync import KStep, Sync, UsageError, load_checkpoint, save_checkpoint
from hpcasync.comm import World
from hpcasync.train import checkpoint_file, checkpoint_ranks
from hpcasync.train.checkpoint_file import BLOCK, DamagedError
from hpcasync.train.checkpoint_folder import checkpoints, newest_good, next_checkpoint, prune, sweep
from hpcasync.train.checkpoint_ranks import facts_of, read_ranks, write_ranks
from hpcasync.train.checkpoint_tree import pack, unpack
from hpcasync.train.lock import STALE_SECONDS, RunLock

STATE = {"w": torch.arange(12.0).view(3, 4), "n": {0: np.array(3.5), "a/b": (1, None, "x")}, "half": torch.ones(2).bfloat16()}


def write(path: Path, value: float = 1.0) -> Path:
    write_ranks(path, World(), {"value": value}, {"model": {"w": torch.full((5,), value)}}, STATE)
    return path


def read(path: Path) -> tuple[Any, Any, Any]:
    with read_ranks(path, World()) as source:
        return source.facts["value"], source.shared(), source.own()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good checkpoint."""
    return write(tmp_path_factory.mktemp("image") / "checkpoint-000001.h5").read_bytes()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    value, shared, own = read(write(tmp_path / "x.h5", 2.0))
    assert value == 2.0 and torch.equal(shared["model"]["w"], torch.full((5,), 2.0))
    assert torch.equal(own["w"], STATE["w"]) and own["n"][0] == 3.5 and own["n"]["a/b"] == (1, None, "x")
    assert own["half"].dtype == torch.bfloat16 and own["half"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_any_hdf5_tool_reads_it(tmp_path: Path) -> None:
    import h5py

    with h5py.File(write(tmp_path / "x.h5")) as file:
        assert file["model/w"][:].tolist() == [1] * 5
        assert file["ranks/0/w"].shape == (3, 4)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner),
        max_leaves=10,
    )
)  # fmt: skip
def test_plain_trees_come_back_as_they_were(tree: Any) -> None:
    plain, arrays = pack(tree)
    again = unpack(json.loads(json.dumps(plain)), arrays.__getitem__)
    assert repr(again) == repr(tree)


@given(st.dictionaries(st.text(max_size=6), st.integers(0, 4), max_size=5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_of_any_name_come_back(tmp_path: Path, sizes: dict[str, int]) -> None:
    tree = {"top": {name: np.arange(size) for name, size in sizes.items()}}
    write_ranks(tmp_path / "x.h5", World(), {}, {}, tree)
    with read_ranks(tmp_path / "x.h5", World()) as source:
        found = source.own()["top"]
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in tree["top"].items()}


def test_what_a_file_can_not_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't hold ranks/0/a/0: found object"):
        write_ranks(tmp_path / "x.h5", World(), {}, {}, {"a": [object()]})
    assert not list(tmp_path.iterdir())


def test_large_arrays_travel_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_ranks, "PIECE", 64)
    tree = {"a": np.arange(1000.0).reshape(2, 5, 100), "b": np.arange(100), "c": np.array(2), "d": np.zeros((0, 3))}
    write_ranks(tmp_path / "x.h5", World(), {}, {}, tree)
    with read_ranks(tmp_path / "x.h5", World()) as source:
        found = source.own()
    assert all(np.array_equal(found[k], tree[k]) and found[k].shape == tree[k].shape for k in tree)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits_and_cut_files_are_found(tmp_path: Path, image: bytes, data: st.DataObject) -> None:
    broken = bytearray(image)
    if data.draw(st.booleans(), "cut"):
        del broken[data.draw(st.integers(0, len(broken) - 1), "length") :]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            broken[data.draw(st.integers(0, len(broken) - 1), "byte")] ^= 1 << data.draw(st.integers(0, 7), "bit")
        if broken == image:
            return
    path = tmp_path / "checkpoint-000002.h5"
    path.write_bytes(broken)
    with pytest.raises(DamagedError, match=r"checkpoint-000002\.h5"):
        read(path)
    (tmp_path / "checkpoint-000001.h5").write_bytes(image)
    good, warning = newest_good(tmp_path)
    assert good == tmp_path / "checkpoint-000001.h5" and warning.count("Going on from") == 1


def test_every_single_bit_of_the_head_counts(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "x.h5"
    for bit in range(8 * BLOCK):
        broken = bytearray(image)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(DamagedError):
            facts_of(path)


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-000001.h5")
    path = write(tmp_path / "checkpoint-000002.h5")
    with path.open("rb+", buffering=0) as raw:
        checkpoint_file._seal(raw, version=9)
    for look in (lambda: read(path), lambda: newest_good(tmp_path)):
        with pytest.raises(UsageError, match="has format 9, this hpcasync reads 1; update hpcasync") as found:
            look()
        assert not isinstance(found.value, DamagedError)


def test_no_checkpoint_is_whole(tmp_path: Path, image: bytes) -> None:
    assert newest_good(tmp_path) == (None, "")
    for number in (1, 2):
        (tmp_path / f"checkpoint-00000{number}.h5").write_bytes(image[: -number * 10])
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole"):
        newest_good(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "gone.h5")


def test_the_last_n_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    for _ in range(4):
        next_checkpoint(tmp_path).write_bytes(b"")
    (tmp_path / ".checkpoint-000005.h5.host.1.ab.tmp").write_bytes(b"")
    prune(tmp_path, 2)
    sweep(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == sorted(p.name for p in tmp_path.iterdir())
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003.h5", "checkpoint-000004.h5"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_keeps_the_one_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        path = write(disk / "x.h5")
        before = path.read_bytes()
        big = {"a": np.random.default_rng(0).random(100_000)}
        with pytest.raises(UsageError, match="disk is full"):
            write_ranks(path, World(), {}, {}, big)
        # Also where the free space is promised wrongly and the writes themselves fail, in HDF5's hands.
        with pytest.raises(UsageError, match="disk is full"), checkpoint_file.writing(path) as file:
            for i in range(8):
                file[f"a{i}"] = big["a"]
        assert path.read_bytes() == before and [p.name for p in disk.iterdir()] == ["x.h5"]
    finally:
        subprocess.run(["umount", disk], check=True)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from hpcasync.comm import World
from hpcasync.train.checkpoint_folder import next_checkpoint, prune
from hpcasync.train.checkpoint_ranks import write_ranks
folder = Path(sys.argv[1])
print("ready", flush=True)
while True:
    write_ranks(next_checkpoint(folder), World(), {"value": 1}, {}, {"a": np.random.random(300_000)})
    prune(folder, 2)
"""


@pytest.mark.slow
def test_killed_at_any_time_no_damaged_file_has_a_final_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 1.5))
        writer.kill()
        writer.wait()
        for path in checkpoints(tmp_path):
            assert facts_of(path)["value"] == 1
        assert len(checkpoints(tmp_path)) <= 3
    sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(UsageError, match=rf"a run is at work in .*: process {os.getpid()} on "):
        RunLock(tmp_path)
    lock.check()
    lock.release()
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_locks_of_the_dead_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(tmp_path)
    lock._stop.set()
    holder = json.loads(lock.path.read_text())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for change in (
        {"started": "1"},  # another process has its number now
        {"pid": 2**22 + 1},  # it is gone
        {"host": "elsewhere", "job": "7", "restart": "0"},  # the same Slurm job, before it was requeued
    ):
        lock.path.write_text(json.dumps(holder | change))
        RunLock(tmp_path).release()
        assert not lock.path.exists()
    lock.path.write_text(json.dumps(holder | {"host": "elsewhere"}))
    with pytest.raises(UsageError, match="on elsewhere"):
        RunLock(tmp_path)
    old = time.time() - STALE_SECONDS - 5
    os.utime(lock.path, (old, old))
    taken = RunLock(tmp_path)
    with pytest.raises(UsageError, match="no longer of this run"):
        lock.check()
    taken.release()


def net(width: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2))


def sync(model: torch.nn.Module) -> Sync:
    return Sync(torch.optim.Adam(model.parameters(), 0.1), world=World(), model=model)


def train(model: torch.nn.Module, mode: Any, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        mode.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        mode.step()
        schedule.step()


def test_a_scripts_checkpoint_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    model = net()
    mode = sync(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(mode, 0.1, total_steps=20)
    train(model, mode, schedule, 5)
    save_checkpoint(tmp_path / "x.h5", mode, schedule=schedule, extra={"note": [1, torch.ones(2)]})
    train(model, mode, schedule, 5)
    other = net()
    again = sync(other)
    schedule = torch.optim.lr_scheduler.OneCycleLR(again, 0.1, total_steps=20)
    found = load_checkpoint(tmp_path / "x.h5", again, schedule=schedule)
    assert found.extra["note"][0] == 1 and found.reset == ()
    train(other, again, schedule, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_another_model_mode_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    model = net()
    save_checkpoint(tmp_path / "x.h5", sync(model))
    with pytest.raises(UsageError, match=r"0.weight is float32 \(4, 3\) in the checkpoint, float32 \(5, 3\) here"):
        load_checkpoint(tmp_path / "x.h5", sync(net(5)))
    with pytest.raises(UsageError, match="is of mode 'sync', this is mode 'kstep'"):
        load_checkpoint(tmp_path / "x.h5", KStep(torch.optim.Adam(model.parameters()), world=World(), model=model))
    with pytest.raises(UsageError, match="is of optimizer 'Adam', this is optimizer 'SGD'"):
        load_checkpoint(tmp_path / "x.h5", Sync(torch.optim.SGD(model.parameters(), 0.1), world=World(), model=model))
    with pytest.raises(UsageError, match="holds no loader"):
        load_checkpoint(tmp_path / "x.h5", sync(model), loader=torch.optim.lr_scheduler.StepLR(sync(model), 1))
