"""Event files, read back by TensorBoard itself: of every mode, of a resumed run, of ranks on two hosts; without the package."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.hosts import HostsRun
from tests.mpi import MpiRun

RECENT = {
    "loss/recent", "speed/samples_per_second", "staleness/median", "staleness/max",
    "time/compute", "time/communicate", "time/wait",
}  # fmt: skip
EVALUATED = {"loss/train", "loss/test", "accuracy/test", "epoch"}


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def points(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in found.Scalars(tag)]


@pytest.mark.parametrize("mode", ["async", "sync", "kstep", "hierarchical"])
def test_curves_of_every_mode(mpirun: MpiRun, mode: str) -> None:
    if mpirun.lane.name != "mpich" and mode != "async":
        pytest.skip("the second MPI library runs this with mode async only")
    done = mpirun.cli(["train", "--tensorboard", "--live", "--mode", mode, "--epochs", "3", "--output", "run"], 2)
    # Plain lines: no terminal here, but for the standard output that Open MPI gives a rank, a pseudo-terminal.
    assert "epoch 3/3  loss" in done.stderr and "samples/s" in done.stdout and "\x1b" not in done.stderr + done.stdout
    folder = mpirun.folder / "run"
    found = events(folder / "tensorboard")
    assert set(found.Tags()["scalars"]) >= RECENT | EVALUATED
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, column in (("accuracy/test", "test_accuracy"), ("loss/test", "test_loss"), ("loss/train", "train_loss")):
        assert points(found, tag) == [(int(row["updates"]), pytest.approx(row[column], rel=1e-6)) for row in metrics]
    result = json.loads((folder / "result.json").read_text())
    shares = [points(found, f"time/{name}")[-1][1] for name in ("compute", "communicate", "wait")]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert points(found, "loss/recent")[-1][1] == pytest.approx(result["train_loss"], rel=0.9)
    assert points(found, "staleness/max")[-1][1] <= result["staleness"]["max"]
    assert points(found, "loss/recent")[-1][0] == result["updates"]
    for rank in range(2):
        own = events(folder / "tensorboard" / f"rank{rank}")
        assert set(own.Tags()["scalars"]) == RECENT and points(own, "speed/samples_per_second")[-1][1] > 0
    assert f"mode = '{mode}'" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_a_resumed_run_replaces_what_came_after_its_checkpoint(mpirun: MpiRun) -> None:
    train = ["train", "--tensorboard", "--epochs", "4", "--keep", "9", "--output", "run"]
    mpirun.cli(train, 2)
    folder = mpirun.folder / "run"
    first = sorted(folder.glob("checkpoint-*.h5"))[0]
    mpirun.cli([*train, "--resume", first], 2)
    found = events(folder / "tensorboard")
    assert [value for _, value in points(found, "epoch")] == [1, 2, 3, 4]
    steps = [step for step, _ in points(found, "loss/recent")]
    assert steps == sorted(steps)
    assert len(list((folder / "tensorboard").glob("events*"))) == 2


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)  # Open MPI passed it too: a few messages per second
def test_scripts_and_several_hosts(two_hosts: HostsRun) -> None:
    done = two_hosts(
        """
        import sys, time, torch
        import hpcasync as ha
        world = ha.init(threads=1)
        model = torch.nn.Linear(4, 2)
        with ha.KStep(torch.optim.SGD(model.parameters(), 0.1), every=4, world=world) as opt:
            with ha.Monitor(opt, tensorboard=sys.argv[1]) as monitor:
                steps = 0
                while steps < 20 or not world.gather(monitor._pointed)[0]:  # until rank 0 has heard of all
                    opt.zero_grad()
                    model(torch.ones(3, 4)).sum().backward()
                    opt.step()
                    steps += 1
                    time.sleep(0.01)
                    monitor.step(float(world.rank + 1), 3)
                monitor.scalars({"accuracy/test": 0.5}, steps)
        print("nodes", world.nodes)
        """,
        n=4,
        args=[two_hosts.folder / "tb"],
    )
    assert "nodes 2" in done.stdout
    for rank in range(4):
        own = events(two_hosts.folder / "tb" / f"rank{rank}")
        assert points(own, "loss/recent")[-1][1] == rank + 1
    assert points(events(two_hosts.folder / "tb"), "loss/recent")[-1][1] == 2.5


@pytest.mark.parametrize("lane", ["mpich"], indirect=True)
def test_without_the_package_it_is_one_error(mpirun: MpiRun) -> None:
    (mpirun.folder / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *where: None if name == 'tensorboardX' else find(name, *where)\n"
    )
    env = mpirun._environment(None)
    path = {"PYTHONPATH": f"{mpirun.folder}:{env['PYTHONPATH']}"}
    for ranks in (None, 3):
        done = mpirun.cli(["train", "--tensorboard", "--output", "run"], ranks, env=path, check=False)
        assert done.returncode == 2
        assert done.stderr.count("--tensorboard needs the package tensorboardX") == 1
        assert "pip install 'hpcasync[tensorboard]'" in done.stderr and "Traceback" not in done.stderr
        assert not (mpirun.folder / "run").exists()


def test_a_full_disk_ends_the_event_files_not_the_run(tmp_path: Path) -> None:
    script = """
        import resource, time
        from pathlib import Path
        from hpcasync.train.event_file import EventFiles
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing more is an error, as on a full disk
        files = EventFiles(Path("tb"))
        for step in range(3000):
            files.scalars({"loss": 1.0}, step)
        files.close()
        print("went on")
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.stdout == "went on\n" and done.returncode == 0
    assert done.stderr.count("can't write for TensorBoard into tb: File too large; the run goes on without") == 1
    assert len(points(events(tmp_path / "tb"), "loss")) > 100  # what was written before is whole
