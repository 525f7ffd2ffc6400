"""The configuration of a simulation: that of a run, and of the virtual machine it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcasync.errors import UsageError, unknown
from hpcasync.modes.block import BLOCK_KEYS, BlockOptions, check_delay
from hpcasync.simulate.cluster import Cluster, Network, parse_changes, parse_network
from hpcasync.simulate.distributions import Distribution, parse_distribution
from hpcasync.simulate.like import read_like
from hpcasync.simulate.units import bytes_per_second
from hpcasync.train.config import GUIDED_KEYS, OPTIONS, Option, TrainConfig, make_config, rule_options, typed_value
from hpcasync.train.slow import parse_slow

MODES = ("async", "sync", "kstep", "hierarchical")

SIMULATE_OPTIONS = (
    Option("workers", int, 4, "virtual workers, the late ones included"),
    Option("compute", str, "constant:1.0", "seconds of a gradient: constant:MEAN, exponential:MEAN, lognormal:MEAN,SIGMA, "
           "gamma:MEAN,SHAPE, recorded:FILE; MEAN also with ms or us"),
    Option("network", str, "0,inf", "LATENCY,BANDWIDTH of pushes, pulls and averages, such as 5us,10GB/s"),
    Option("service", str, "inf", "bandwidth at which the store applies pushes; pushes to one shard queue"),
    Option("slow", "list", (), "RANK:FACTOR: a slower (or faster) worker; may be repeated"),
    Option("fail", "list", (), "RANK@SECONDS: a worker dies; may be repeated"),
    Option("join", "list", (), "RANK@SECONDS: a worker comes late, or again; may be repeated"),
    Option("groups", int, 2, "groups, asynchronous inside, K-step averages among them", ("hierarchical",)),
    Option("like", str, None, "folder of a live run: its number of workers, compute and communication times"),
    Option("free_running", bool, False, "no meeting at the end of an epoch", ("async",)),
    Option("delay", int, 0, "mode async, artificial delay: a read is of one of the last N + 1 versions, at random; mode "
           "hierarchical: steps that an average may take while the workers compute", ("async", "hierarchical")),
    Option("eval_updates", int, None, "evaluate also after so many pushes", ("async", "hierarchical")),
    Option("naive", bool, False, "evaluate gradients one by one"),
    Option("dry", bool, False, "no gradients: throughput, queueing and staleness only", ("async",)),
    Option("updates", int, None, "pushes of a dry simulation (default: 100 per worker)", ("async",)),
    Option("parameters", int, None, "size of the model in a dry simulation (default: the model's)", ("async",)),
)  # fmt: skip
"""What a simulation has beside the options of a run."""

_LEAST = {"workers": 1, "groups": 1, "delay": 0, "eval_updates": 1, "updates": 1, "parameters": 1}
_LIVE_ONLY = ("device", "checkpoint_every", "keep", "stall_seconds", "resume", "record", "live", "tensorboard")
_DRY = ("updates", "parameters")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig(TrainConfig):
    """What to simulate: a run's configuration, and one field for each of ``SIMULATE_OPTIONS``."""

    workers: int = 4
    compute: str = "constant:1.0"
    network: str = "0,inf"
    service: str = "inf"
    fail: tuple[str, ...] = ()
    join: tuple[str, ...] = ()
    groups: int = 2
    like: str | None = None
    free_running: bool = False
    delay: int = 0
    eval_updates: int | None = None
    naive: bool = False
    dry: bool = False
    updates: int | None = None
    parameters: int | None = None

    def keys(self) -> dict[str, Any]:
        """The configuration as the flat keys of a file, without those of other modes and those not set."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        options = {o.name: o for o in (*OPTIONS, *SIMULATE_OPTIONS)}  # of two by one name the simulator's holds
        foreign = {o.name for o in options.values() if not _belongs(o, self.mode)}
        foreign |= {*_LIVE_ONLY, *(() if self.guided else GUIDED_KEYS)}
        flat = {k: v for k, v in flat.items() if k not in foreign} | self.options
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items() if v is not None}

    @property
    def cluster(self) -> Cluster:
        """The virtual machine.

        Raises:
            UsageError: something of it does not parse or is out of range.
        """
        compute: tuple[Distribution, ...] = (parse_distribution(self.compute),)
        network, recording = parse_network(self.network), None
        if self.like is not None:
            like = read_like(Path(self.like))
            compute = tuple(Distribution("constant", mean) for mean in like.compute)
            mean = sum(like.communicate) / len(like.communicate)
            recording = like.recording
            # Half for the push, half for the pull.
            network = Network(mean / 2, exchange=None if recording is None else recording.exchange)
        return Cluster(
            self.workers,
            compute,
            network,
            bytes_per_second(self.service, "--service"),
            parse_slow(self.slow, self.workers),
            parse_changes(self.fail, self.join, self.workers),
            recording,
        )


def simulate_options() -> tuple[Option, ...]:
    """All options of a simulation but the rules'."""
    return (*SIMULATE_OPTIONS, *(o for o in OPTIONS if o.name not in {*_LIVE_ONLY, *(own.name for own in SIMULATE_OPTIONS)}))


def make_simulate_config(*sources: Mapping[str, Any]) -> SimulateConfig:
    """Merge keys, the later sources winning, check them, and fill in what is not given.

    Raises:
        UsageError: unknown key, wrong type, value out of range, a key of another mode.
    """
    own = {o.name: o for o in SIMULATE_OPTIONS}
    keys = {k.replace("-", "_"): v for source in sources for k, v in source.items() if v is not None}
    known = {o.name: o for o in (*OPTIONS, *rule_options(), *SIMULATE_OPTIONS)}
    for key in keys:
        if key not in known:
            raise unknown("option", key, known)
    mine = {k: typed_value(own[k], keys.pop(k)) for k in list(keys) if k in own}
    mode = keys.get("mode", "async")
    if mode not in MODES:
        raise unknown("mode", str(mode), MODES)
    for key in (*mine, *keys):
        if not _belongs(known[key], mode):
            modes = [m for m in MODES if _belongs(known[key], m)]
            raise UsageError(f"--{key.replace('_', '-')} belongs to mode {', '.join(modes)}; the mode is {mode}")
    for key, least in _LEAST.items():
        if mine.get(key) is not None and mine[key] < least:
            raise UsageError(f"--{key.replace('_', '-')}={mine[key]}: expected a whole number >= {least}")
    if mine.get("dry") and keys.get("guided"):
        raise UsageError("--dry has no gradients to guide; leave out --guided, or --dry")
    if not mine.get("dry"):
        for key in _DRY:
            if key in mine:
                raise UsageError(f"--{key} is the size of a dry simulation; give --dry too")
    _like_workers(mine)
    base = {k: v for k, v in _base_config(keys, mine.get("workers", SimulateConfig.workers)).items() if k not in own}
    config = SimulateConfig(**(base | mine))
    _ = config.cluster  # raises for what does not parse
    if mode == "hierarchical" and config.delay:
        check_delay(config.delay, BlockOptions(**{k: getattr(config, k) for k in BLOCK_KEYS}))
        if config.inner_state != "keep":
            raise UsageError(f"--inner-state {config.inner_state} with --delay {config.delay}: expected keep, or no delay")
    if mode == "hierarchical" and config.groups > config.workers:
        raise UsageError(f"--groups={config.groups}: more groups than the {config.workers} workers")
    return config


def _base_config(keys: dict[str, Any], workers: int) -> dict[str, Any]:
    """The fields of a run's configuration, checked as those of a run are."""
    keys = dict(keys)
    named = "name" in keys
    config = make_config(keys, workers=lambda: workers)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if not named:
        fields["name"] = f"{config.name.rsplit('-', 1)[0]}-{config.mode}-simulated"
    return fields


def _like_workers(mine: dict[str, Any]) -> None:
    """Take the number of workers from ``--like``; its times leave no room for others."""
    if mine.get("like") is None:
        return
    for key in ("compute", "network"):
        if key in mine:
            raise UsageError(f"--like takes the times of the recorded run; it does not go with --{key}")
    mine.setdefault("workers", len(read_like(Path(mine["like"])).compute))


def _belongs(option: Option, mode: str) -> bool:
    return not option.modes or mode in option.modes
