"""Stopped by a signal, resumed, and the same as never stopped: real signals to real ranks, in all modes.

A launch takes seconds and these runs a fraction of one, so each launch is a stage of all runs of its ranks: the first trains them
whole and up to a first signal, the second, in new processes, goes on to the next signal, the third to the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import pytest

from tests.checkpoints import differences, newest
from tests.mpi import MpiRun, require_lane

# Sends real signals to itself at exact steps: {rank: step}; the handlers and all that follows are the program's own.
PROGRAM = """
import contextlib, io, json, os, signal, sys
from hpcasync.train import signals
signals.install()
from hpcasync import init
from hpcasync.cli import main
from hpcasync.train import in_step
from hpcasync.train.progress import Progress

in_step.LOOK_SECONDS = 0.0  # ask after every step: these runs last a fraction of a second
world, plain, at, seen = init(), Progress.step, {}, 0

def step(self, *args):
    global seen
    seen += 1
    if at.get(str(world.rank)) == seen:
        os.kill(os.getpid(), getattr(signal, name))
    plain(self, *args)

Progress.step = step
said = {}
for run, (argv, at, name) in json.load(open(sys.argv[1])).items():
    signals.forget()
    seen, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    said[run] = [code, out.getvalue(), err.getvalue()]
everyone = world.gather(said)
if world.rank == 0:
    print(json.dumps(everyone))
"""

MODEL = """
import torch
def net(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.BatchNorm1d(24),
        torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(24, classes))
"""

MODES = {
    "sync": ["--mode", "sync", "--base", "adam", "--schedule", "cosine"],
    "kstep": ["--mode", "kstep", "--every", "7", "--block-momentum", "0.5", "--base", "momentum", "--lr", "0.02"],
    # Groups of one rank: the same bits in every run.
    "hierarchical": ["--mode", "hierarchical", "--groups", "RANKS", "--every", "7", "--delay", "4", "--block-momentum", "0.5",
                     "--rule", "asgd", "--base", "momentum", "--lr", "0.02"],
    "guided": ["--mode", "sync", "--guided", "--rho", "4", "--base", "momentum", "--lr", "0.02"],
}  # fmt: skip
RULES = ["trend-smooth", "gsgm", "easgd", "dc-asgd"]
RANKS = [("mpich", 1), ("mpich", 2), ("mpich", 3), ("openmpi", 3)]
pytestmark = pytest.mark.timeout(1000)  # three launches for the first test of its ranks
COMMON = ["train", "--model", "mynet:net", "--epochs", "3", "--batch", "32", "--json", "--seed", "3"]
OTHER = {mode: MODES.get(mode, ["--mode", "async", "--rule", "gsgm"]) for mode in ("sync", "kstep", "async")}
TIMES = ("seconds", "samples_per_second", "share", "resumed_from", "restarts")


def modes_of(lane: str, ranks: int) -> list[str]:
    """The modes that are stopped and resumed there."""
    if lane == "openmpi":
        return ["sync", "kstep"]
    return [mode for mode in MODES if mode != "hierarchical" or ranks > 1]


class Said(NamedTuple):
    """What one command said on rank 0: the object on the last line of standard output, and standard error."""

    code: int
    result: dict[str, Any]
    stderr: str


class Runs:
    """All runs of one lane and number of ranks: ``first``, ``second`` and ``last`` are what they said in each stage."""

    def __init__(self, lane: str, ranks: int, folder: Path) -> None:
        self.lane, self.ranks, self.folder = lane, ranks, folder
        self._mpirun = MpiRun(require_lane(lane), folder)
        (folder / "mynet.py").write_text(MODEL)
        modes = modes_of(lane, ranks)
        flags = {mode: [str(ranks) if flag == "RANKS" else flag for flag in MODES[mode]] for mode in modes}
        self.rules = RULES[:2] if lane == "openmpi" else RULES
        whole = {f"{mode} whole": ([*COMMON, *flags[mode], "--output", f"{mode}-whole"], {}, "") for mode in modes}
        stop = {m: ([*self.command(m, flags[m])], {ranks - 1: 2}, "SIGUSR1") for m in modes}
        again = {m: (stop[m][0], dict.fromkeys(range(ranks), 18), "SIGTERM") for m in modes}
        rules = {rule: (self.command(rule, ["--mode", "async", "--rule", rule, "--staleness", "4"]),) for rule in self.rules}
        rules_stop = {rule: (*rules[rule], {ranks - 1: 5}, "SIGUSR1") for rule in self.rules}
        if ranks == 1:  # alone it is exact too
            argv = [*COMMON, "--mode", "async", "--rule", "trend-smooth", "--base", "adam", "--output"]
            whole["alone whole"] = ([*argv, "alone-whole"], {}, "")
            rules_stop["alone"] = ([*argv, "alone", "--resume", "auto"], {0: 61}, "SIGUSR1")
        if (lane, ranks) == ("mpich", 2):
            plain = ["train", "--mode", "sync", "--json"]
            whole["finished"] = ([*plain, "--output", "finished", "--epochs", "2"], {}, "")
            stop |= {f"other-{mode}": (self.other(mode), {0: 26}, "SIGUSR1") for mode in OTHER}
            again["finished"] = ([*plain, "--output", "finished", "--epochs", "2", "--resume", "auto"], {}, "")
            again["more"] = ([*plain, "--output", "finished", "--epochs", "3", "--resume", "auto"], {}, "")
        self.first = self._stage(whole | stop | rules_stop, ranks)
        self.places = {rule: self._places(self.first[rule]) for rule in self.rules}
        done = {rule: (argv, {}, "") for rule, (argv, _, _) in rules_stop.items()}
        self.second = self._stage(again | done, None if ranks == 1 else ranks)  # alone without mpiexec, too
        last = {mode: (stop[mode][0], {}, "") for mode in modes}
        if (lane, ranks) == ("mpich", 2):
            last["other"] = ([*plain, "--epochs", "4", "--resume", "finished"], {}, "")
        self.last = self._stage(last, ranks)

    def command(self, name: str, flags: Sequence[str]) -> list[str]:
        return [*COMMON, *flags, "--output", name, "--resume", "auto"]

    def other(self, mode: str) -> list[str]:
        return [*self.command(f"other-{mode}", OTHER[mode]), "--checkpoint-every", "10"]

    def resume_on(self, ranks: int, modes: Sequence[str]) -> dict[str, Said]:
        """Go on with those that are there for it, on other ranks."""
        return self._stage({mode: (self.other(mode), {}, "") for mode in modes}, ranks)

    def _stage(self, commands: dict[str, Any], n: int | None) -> dict[str, Said]:
        path = self.folder / "stage.json"
        path.write_text(json.dumps(commands))
        done = self._mpirun(PROGRAM, n, args=[path], timeout=300)
        everyone = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
        assert all({run: said[0] for run, said in rank.items()} == {r: s[0] for r, s in everyone[0].items()} for rank in everyone)
        assert not list(self.folder.glob("*/run.lock"))
        said = {r: Said(code, json.loads(out.rstrip("\n").split("\n")[-1]), err) for r, (code, out, err) in everyone[0].items()}
        assert all((self.folder / s.result["checkpoint"]).exists() for s in said.values() if s.code == 75)
        return said

    def _places(self, said: Said) -> list[dict[str, Any]]:
        """Where each rank was in its epoch, of the checkpoint that a run has stopped with: a later one replaces it."""
        with h5py.File(self.folder / said.result["checkpoint"]) as file:
            states = [json.loads(file[f"ranks/{r}/state"][()].tobytes()) for r in range(self.ranks)]
        return [state["parts"]["run"]["place"] for state in states]

    def check_stopped(self, said: Said, name: str) -> dict[str, Any]:
        """That it has stopped for the signal, with a checkpoint; returns what it printed."""
        assert said.code == 75, said
        assert f"stopped by {name}" in said.stderr and "Traceback" not in said.stderr
        assert said.result["stopped"] == name
        return said.result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Runs]:
    """The runs of a lane and a number of ranks, made by the first test that wants them."""
    made: dict[tuple[str, int], Runs] = {}

    def get(lane: str, ranks: int) -> Runs:
        if (lane, ranks) not in made:
            made[lane, ranks] = Runs(lane, ranks, tmp_path_factory.mktemp(f"{lane}-{ranks}"))
        return made[lane, ranks]

    return get


@pytest.mark.parametrize(
    ("lane_name", "ranks", "mode"),
    [(lane, ranks, mode) for lane, ranks in RANKS for mode in modes_of(lane, ranks)],
)
def test_stopped_twice_and_resumed_gives_the_same_bits(
    runs: Callable[[str, int], Runs], lane_name: str, ranks: int, mode: str
) -> None:
    done = runs(lane_name, ranks)
    whole = done.first[f"{mode} whole"].result
    first = done.check_stopped(done.first[mode], "SIGUSR1")
    assert first["epoch"] == 1 and first["step"] >= 2
    second = done.check_stopped(done.second[mode], "SIGTERM")
    assert second["restarts"] == 1 and (second["epoch"], second["step"]) > (first["epoch"], first["step"])
    assert done.last[mode].code == 0
    last = done.last[mode].result
    assert last["restarts"] == 2 and last["resumed_from"].endswith(".h5")
    assert {k: v for k, v in last.items() if k not in TIMES} == {k: v for k, v in whole.items() if k not in TIMES}
    assert differences(done.folder / f"{mode}-whole", done.folder / mode) == []
    rows = [(done.folder / d / "metrics.jsonl").read_text().splitlines() for d in (f"{mode}-whole", mode)]
    for one, other in zip(*rows, strict=True):
        x, y = json.loads(one), json.loads(other)
        assert {**x, "seconds": 0} == {**y, "seconds": 0}


@pytest.mark.parametrize(
    ("lane_name", "ranks", "rule"),
    [(lane, ranks, rule) for lane, ranks in RANKS if ranks != 2 for rule in (RULES if lane == "mpich" else RULES[:2])],
)
def test_async_stops_in_the_middle_and_goes_on(
    runs: Callable[[str, int], Runs], lane_name: str, ranks: int, rule: str
) -> None:
    done = runs(lane_name, ranks)
    first = done.check_stopped(done.first[rule], "SIGUSR1")
    assert first["epoch"] == 1 and first["step"] > 0
    steps = -(-1438 // ranks // 32)
    assert all(0 < place["steps"] <= steps for place in done.places[rule])
    assert done.second[rule].code == 0
    result = done.second[rule].result
    assert result["updates"] == 3 * steps * ranks and result["restarts"] == 1
    with h5py.File(done.folder / rule / "run.h5") as file:
        assert file["ranks/samples"][:].sum() == 3 * 1438
    assert result["test_accuracy"] > 0.5


def test_one_rank_in_mode_async_is_exact_too(runs: Callable[[str, int], Runs]) -> None:
    done = runs("mpich", 1)
    done.check_stopped(done.first["alone"], "SIGUSR1")
    assert done.second["alone"].code == 0 and done.second["alone"].result["restarts"] == 1
    assert differences(done.folder / "alone-whole", done.folder / "alone") == []


def test_on_other_ranks_it_goes_on_and_says_what_was_reset(runs: Callable[[str, int], Runs]) -> None:
    done = runs("mpich", 2)
    for mode in OTHER:
        done.check_stopped(done.first[f"other-{mode}"], "SIGUSR1")
        for path in sorted((done.folder / f"other-{mode}").glob("checkpoint-*.h5"))[1:]:
            path.unlink()  # kstep stops at an average: the one before lies inside a block
    said = done.resume_on(3, [*OTHER])
    for mode, (code, result, text) in said.items():
        assert code == 0 and result["ranks"] == 3 and result["test_accuracy"] > 0.4
        assert "made by 2 ranks, now 3. Reset: " in text
        assert any("random numbers" in line for line in result["reset"])
        with h5py.File(done.folder / f"other-{mode}" / "run.h5") as file:
            assert file["ranks/samples"][:].sum() >= 3 * 1438
    assert "their mean" in said["kstep"].stderr
    assert "last_gradient of rule gsgm" in said["async"].stderr


def test_a_finished_run_resumed_gives_its_result_again_and_more_epochs_go_on(runs: Callable[[str, int], Runs]) -> None:
    done = runs("mpich", 2)
    first, again, more = done.first["finished"].result, done.second["finished"].result, done.second["more"].result
    assert again["test_loss"] == first["test_loss"] and again["updates"] == first["updates"]
    assert more["epochs"] == 3 and more["test_loss"] < first["test_loss"]
    assert len((done.folder / "finished" / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(list((done.folder / "finished").glob("checkpoint-*.h5"))) == 2
    other = done.last["other"].result
    assert other["resumed_from"] == str(newest(done.folder / "finished").relative_to(done.folder))
    assert len(list(done.folder.glob("runs/*/result.json"))) == 1


LAUNCHER = """
import glob
import os, signal, subprocess, sys, time
job = subprocess.Popen(sys.argv[2:])
while not glob.glob("run/checkpoint-*.h5") and job.poll() is None:
    time.sleep(0.05)
job.send_signal(getattr(signal, sys.argv[1]))
print("CODE", job.wait())
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_mpiexec_reaches_the_ranks(mpirun: MpiRun, name: str) -> None:
    lane = mpirun.lane
    if lane.name != "mpich" and name == "SIGTERM":
        pytest.skip("what Open MPI's mpiexec does with SIGTERM has not been measured; Slurm sends it to the ranks")
    train = ["train", "--mode", "async", "--epochs", "4000", "--eval-every", "4000", "--checkpoint-every", "20"]
    command = [lane.mpiexec, *lane.flags, "-n", "2", *lane.cli, *train, "--output", "run"]
    done = mpirun(LAUNCHER, None, args=[name, *command], timeout=250)
    assert "CODE 75" in done.stdout and f"stopped by {name}" in done.stderr
    assert not (mpirun.folder / "run" / "run.lock").exists()
