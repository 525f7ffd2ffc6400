"""Mode async outlives its ranks: real jobs, really killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpcasync.comm import World
from hpcasync.replay.replay import Replay
from hpcasync.train.checkpoint_folder import checkpoints
from hpcasync.train.checkpoint_ranks import read_ranks
from tests.launch.survivors import SurvivingJob
from tests.mpi import LANES, Lane, require_lane

pytestmark = pytest.mark.timeout(600)  # jobs of 4 ranks on a machine that may be busy
SLOW_EPOCHS = ("--batch", "4")  # 90 steps of a rank of 4
FOREVER = ("--epochs", "100000", "--eval-every", "1", *SLOW_EPOCHS)


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    return require_lane(request.param)


def updates_are_whole(folder: Path, deaths: list[dict[str, Any]]) -> None:
    """Every push of a rank is in the shards' versions: of a dead one, all but perhaps the one that it died in."""
    with read_ranks(max(checkpoints(folder)), World()) as source:
        versions = source.shared()["versions"]
        place = source.facts["position"]
    assert place["step"] >= 0
    pushed = sum(death["updates"] for death in deaths)
    living = read_updates(max(checkpoints(folder)))
    most = living + pushed + len(deaths) + sum(len(death["shards"]) for death in deaths)
    assert (versions >= living + pushed).all() and (versions <= most).all()


def curves_end_with_their_rank(folder: Path, updates: int) -> None:
    """TensorBoard's: nothing is told of ranks 1 and 2 after their deaths, but their updates count."""
    last = {}
    for name in ("", "rank0", "rank1", "rank2"):
        found = EventAccumulator(str(folder / "tensorboard" / name))
        found.Reload()
        speeds = found.Scalars("speed/samples_per_second")
        assert all(point.value > 0 for point in speeds)
        last[name] = speeds[-1].step
    assert last[""] == last["rank0"] == updates > last["rank1"] > last["rank2"]


def read_updates(path: Path) -> int:
    """Updates of all ranks that a checkpoint holds."""
    with read_ranks(path, World()) as source:
        return sum(own["updates"] for own in source.own()["parts"]["run"]["everyone"])


def nothing_of_the_dead_is_in_the_sum(folder: Path) -> None:
    """Of gsgm: the last gradient of a dead rank would pull the model for ever."""
    with read_ranks(max(checkpoints(folder)), World()) as source:
        total = source.shared()["vectors"]["gradient_sum"]
        mean, ranks = source.mean("mode/private/last_gradient"), source.facts["ranks"]
    assert ranks == 3 and sorted(total) == sorted(mean)
    for name, values in total.items():
        assert abs(values - ranks * mean[name]).max() <= 1e-4 * max(1.0, abs(mean[name]).max()), name


@pytest.mark.timeout(600)  # the replay of 18,000 updates under load
def test_the_living_finish_the_run(lane: Lane, tmp_path: Path) -> None:
    words = ("--epochs", "50", "--schedule", "cosine", "--record", "--tensorboard", *SLOW_EPOCHS)
    with SurvivingJob(lane, tmp_path / "run", *words) as job:
        job.wait_epochs(2)
        job.send(2)
        job.wait_epochs(2)
        job.send(1)
        code, result, err = job.end()
    assert code == 0, err
    assert "rank 2 died" in err and "rank 1 died" in err
    assert all(f"step {death['step']} (step {death['recorded']} of its record)" in err for death in result["deaths"])
    assert [death["rank"] for death in result["deaths"]] == [2, 1] and result["ranks"] == 2
    assert result["epochs"] == 50 and result["test_accuracy"] > 0.9
    updates_are_whole(tmp_path / "run", result["deaths"])
    curves_end_with_their_rank(tmp_path / "run", result["updates"])
    replayed = Replay(tmp_path / "run").run()
    assert replayed.identical and replayed.complete, replayed
    # Before the first death 4 ranks made 90 steps an epoch, after the last one 2 made 180.
    assert 50 * 358 - 2 * 180 <= result["updates"] <= 50 * 360


@pytest.mark.parametrize(
    "rule",
    [
        ("--rule", "asgd", "--staleness", "0", "--partition", "dirichlet:0.5"),
        ("--rule", "gsgm", "--patience", "1000"),
        ("--rule", "apam", "--partition", "shards:4"),
        ("--rule", "easgd"),
    ],
    ids=lambda rule: rule[1],
)
def test_nobody_waits_for_the_dead(rule: tuple[str, ...], tmp_path: Path) -> None:
    """Bound, turn and lock are given free; a stop by signal and a resume work after it."""
    lane, output = require_lane("mpich"), tmp_path / "run"
    with SurvivingJob(lane, output, *FOREVER, *rule, "--checkpoint-every", "50") as job:
        job.wait_epochs(1)
        job.send(3)
        job.wait_epochs(2)
        job.process.send_signal(signal.SIGUSR1)
        code, result, err = job.end()
    assert code == 75, err
    assert result["stopped"] == "SIGTERM" and "rank 3 died" in err
    if "gsgm" in rule:
        nothing_of_the_dead_is_in_the_sum(output)
    again = ("--epochs", str(result["epoch"] + 1), *FOREVER[2:], *rule, "--resume", "auto")
    with SurvivingJob(lane, output, *again, ranks=3, before=()) as job:
        code, result, err = job.end()
    assert code == 0, err
    assert "begins again" in " ".join(result["reset"]) and result["ranks"] == 3


def test_the_last_one_goes_on_alone(tmp_path: Path) -> None:
    """All other ranks die at once, while one of them was stopped."""
    with SurvivingJob(require_lane("mpich"), tmp_path / "run", *FOREVER) as job:
        job.wait_epochs(1)
        job.send(1, signal.SIGSTOP)
        for rank in (3, 2, 1):
            job.send(rank)
        job.wait_epochs(2)
        job.process.send_signal(signal.SIGTERM)
        code, _, err = job.end()
    assert code == 75, err
    assert all(f"rank {rank} died" in err for rank in (1, 2, 3))


def test_the_window_dies_with_its_host(lane: Lane, tmp_path: Path) -> None:
    """Rank 0's death ends the job; a restart goes on from the last checkpoint."""
    before = ("--survive", "--max-restarts", "1")
    words = ("--epochs", "40", "--checkpoint-every", "20", *SLOW_EPOCHS)
    with SurvivingJob(lane, tmp_path / "run", *words, ranks=2, before=before) as job:
        job.wait_epochs(2)
        job.send(0)
        code, result, err = job.end()
    assert code == 0, err
    assert "restart 1 of 1" in err and result["restarts"] == 1 and result["updates"] == 40 * 360


# Rank 2 is killed where the ranks begin or end what only all together can do.
DIES = """
import os, signal, torch, hpcasync
from hpcasync.train.progress import Progress
from hpcasync.train.record import Record

def before(owner, name):
    if hpcasync.init().rank == 2:
        setattr(owner, name, lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL))
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def at_start(shape, classes):
    return before(Progress, "__init__")

def at_end(shape, classes):
    return before(Record, "close")
"""


def test_a_death_before_the_first_step_ends_the_job(lane: Lane, tmp_path: Path) -> None:
    env = found_in(tmp_path, "dies", DIES)
    with SurvivingJob(lane, tmp_path / "run", "--model", "dies:at_start", "--record", *FOREVER, env=env) as job:
        code, _, err = job.end()
    assert code not in (0, 2, 75) and "Traceback" not in err and "goes on" not in err, err
    assert "rank 2 died at" in err and "before the ranks trained; the job ends" in err
    assert "the job died with exit code" in err and "of rank 2 (" in err


def test_a_death_in_the_last_meetings_is_told(lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = found_in(tmp_path, "dies", DIES)
    with SurvivingJob(lane, tmp_path / "run", "--model", "dies:at_end", "--record", "--epochs", "2", env=env) as job:
        code, result, err = job.end()
    assert code == 0 and "rank 2 died at" in err, err
    assert [death["rank"] for death in result["deaths"]] == [2] and result["ranks"] == 4
    monkeypatch.syspath_prepend(tmp_path)
    replayed = Replay(tmp_path / "run").run()
    assert replayed.identical and replayed.complete, replayed


# Rank 2 is stopped for ever, inside the update of a shard or while it computes. For the first all are slow, so that others have
# made their first step, and have most of the epoch before them: they come to the lock, not to the meeting at its end.
STOPS = """
import os, signal, time, torch, hpcasync
from hpcasync.store.base import Store

def stop(calls, when):
    calls.append(1)
    if hpcasync.init().rank == 2 and len(calls) == when:
        os.kill(os.getpid(), signal.SIGSTOP)

def in_lock(shape, classes):
    inside, calls = Store._push_shard, []

    def push(self, *args):
        stop(calls, 5)
        return inside(self, *args)

    Store._push_shard = push
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return model

def in_step(shape, classes):
    model, calls = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)), []
    model.register_forward_pre_hook(lambda *_: stop(calls, 20))
    return model
"""
STALL = ("--stall-seconds", "5")


def stopping(folder: Path) -> dict[str, str]:
    """The variables with which `stops` is found."""
    return found_in(folder, "stops", STOPS)


def found_in(folder: Path, name: str, module: str) -> dict[str, str]:
    """Write a module of models; the variables with which it is found."""
    (folder / f"{name}.py").write_text(module)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_rank_stopped_inside_a_lock_is_fenced(lane: Lane, tmp_path: Path) -> None:
    words = ("--model", "stops:in_lock", *STALL, "--epochs", "3")
    with SurvivingJob(lane, tmp_path / "run", *words, env=stopping(tmp_path)) as job:
        code, result, err = job.end()
    assert code == 0, err
    assert "for a shard's lock that rank 2 holds" in err and "stopped by a signal or a debugger" in err
    assert "killed, so as not to wake and write" in err and "rank 2 died at" in err
    (death,) = result["deaths"]
    assert death["rank"] == 2 and death["shards"] and death["cause"].startswith("hung") and result["ranks"] == 3
    updates_are_whole(tmp_path / "run", result["deaths"])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (("--rule", "asgd"), "rank 2 has not come to the meeting at the end of an epoch"),
        (("--rule", "asgd", "--staleness", "0"), "rank 2, behind the bound on staleness"),
        (("--rule", "gsgm", "--patience", "1000"), "a turn that rank 2 does not take"),
    ],
    ids=("meeting", "bound", "turn"),
)
def test_a_stopped_rank_is_fenced_when_it_is_waited_for(rule: tuple[str, ...], says: str, tmp_path: Path) -> None:
    words = ("--model", "stops:in_step", *STALL, "--epochs", "3", *rule)
    with SurvivingJob(require_lane("mpich"), tmp_path / "run", *words, env=stopping(tmp_path)) as job:
        code, result, err = job.end()
    assert code == 0 and says in err, err
    assert [(death["rank"], death["shards"]) for death in result["deaths"]] == [(2, [])]


def test_a_stopped_rank_ends_a_job_that_is_not_to_outlive_it(lane: Lane, tmp_path: Path) -> None:
    """It is named; a restart leaves it out."""
    words = ("--model", "stops:in_lock", *STALL, "--epochs", "3", "--checkpoint-every", "10")
    before = ("--max-restarts", "1", "--min-ranks", "2")
    with SurvivingJob(lane, tmp_path / "run", *words, ranks=3, before=before, env=stopping(tmp_path)) as job:
        code, result, err = job.end()
    assert code == 0, err
    assert "for a shard's lock that rank 2 holds" in err and "The job ends with exit code 76" in err
    assert "of rank 2 (hung at " in err and "with 2 of 3 ranks" in err and result["ranks"] == 2


def test_an_error_still_ends_the_job(lane: Lane, tmp_path: Path) -> None:
    words = ("--lr", "1e30", "--on-nonfinite", "abort", *FOREVER)
    with SurvivingJob(lane, tmp_path / "run", *words, ranks=2) as job:
        code, _, err = job.end()
    assert code not in (0, 75) and "FloatingPointError" in err


@pytest.mark.parametrize("dead", [(), (1, 2)], ids=("all alive", "two dead"))
def test_what_all_find_wrong_is_said_once(dead: tuple[int, ...], tmp_path: Path) -> None:
    """No checkpoint can be written at the stop: exit code 2 and one line, also when some can't come to MPI's barrier any more."""
    run = tmp_path / "run"
    with SurvivingJob(require_lane("mpich"), run, *FOREVER, ranks=3) as job:
        job.wait_epochs(1)
        for rank in dead:
            job.send(rank)
        run.rename(tmp_path / "elsewhere")
        run.write_text("")
        job.process.send_signal(signal.SIGTERM)
        code, _, err = job.end()
    assert code == 2 and "Traceback" not in err, err
    assert err.count("hpcasync: error: ") == 1 and "stopped without a new checkpoint" in err


def test_other_modes_are_refused(tmp_path: Path) -> None:
    with SurvivingJob(require_lane("mpich"), tmp_path / "run", "--mode", "sync", "--epochs", "1", ranks=2) as job:
        code, _, err = job.end()
    assert code == 2 and "only mode async on one node outlives its ranks" in err and err.count("error:") == 1
