"""The configuration of a run: one dataclass, from which the flags and the keys of ``--config`` files are made."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcasync.comm import BACKENDS, check_backend
from hpcasync.comm.progress_choice import PROGRESS
from hpcasync.docstrings import attributes_of
from hpcasync.errors import UsageError, unknown
from hpcasync.modes.block import BLOCK_KEYS, BlockOptions, check_delay
from hpcasync.modes.interval import parse_every
from hpcasync.modes.presets import PRESETS, preset_options
from hpcasync.train.slow import parse_slow

MODES = ("async", "sync", "kstep", "hierarchical")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Option:
    """One flag, which is also one key of a configuration file.

    Attributes:
        name: the key; the flag is ``--name`` with dashes.
        kind: type of the value (``float``, ``int``, ``str``, ``bool``), ``"floats"`` for a list of two, ``"list"`` for texts,
            a flag that may be repeated.
        default: value when not given.
        help: one line.
        modes: modes that it belongs to; empty means all.
    """

    name: str
    kind: Any
    default: Any
    help: str
    modes: tuple[str, ...] = ()


GUIDED_KEYS = ("guided", "rho", "verification")
_ASYNC, _KSTEP, _GUIDED = ("async", "hierarchical"), ("kstep",), ("async", "sync")
_BLOCK, _HIERARCHICAL = ("kstep", "hierarchical"), ("hierarchical",)

OPTIONS = (
    Option("data", str, "digits", "name of a data set or path of an imported HDF5 file"),
    Option("model", str, "mlp", "name of a model or package.module:function"),
    Option("mode", str, "async", "how the ranks train together: " + ", ".join(MODES)),
    Option("rule", str, None, "update rule (default: trend-smooth in modes async and hierarchical, plain in the others)"),
    Option("epochs", int, 5, "passes over the training data"),
    Option("batch", int, 32, "samples per step and rank, at most"),
    Option("partition", str, "iid", "samples of a rank: iid, shards:C (C classes), dirichlet:ALPHA, natural, file:PATH"),
    Option("seed", int, 0, "of the model's start, the order of the data, and dropout"),
    Option("schedule", str, "constant", "learning rate over the run: constant, or cosine (to zero)"),
    Option(
        "staleness", int, None, "a rank further ahead of the slowest, in pushes, waits (default: never; apam 16)", _ASYNC
    ),
    Option("progress", str, None, "between nodes: thread, host-rank or library (default: found out at the start)", ("async",)),
    Option("host_ranks", int, None, "ranks per node set aside with --progress host-rank (default: 1)", ("async",)),
    Option("preset", str, None, "k-avg, m-avg, post-local, bmuf, slowmo or diloco: settings of the options below", _KSTEP),
    Option("every", "whole-or-schedule", 32, "K, local steps per average, or a schedule such as 1:100,8:500,32", _BLOCK),
    Option("block_momentum", float, 0.0, "momentum of the block step, in [0, 1)", _BLOCK),
    Option("nesterov", bool, False, "Nesterov's form of the block momentum", _BLOCK),
    Option("block_lr", float, 1.0, "learning rate of the block step", _BLOCK),
    Option("warm_start", int, 0, "so many first steps average after each step", _BLOCK),
    Option("inner_state", str, "keep", "state of the local optimizer at an average: keep, average, reset", _BLOCK),
    Option("groups", int, None, "groups of ranks, asynchronous inside (default: one per node)", _HIERARCHICAL),
    Option("delay", int, 0, "steps that an average may take while the ranks compute, less than K", _HIERARCHICAL),
    Option("collectives", str, "mpi", "what sums over the ranks: " + ", ".join(BACKENDS), ("sync", *_BLOCK)),
    Option("guided", bool, False, "guided SGD: replay the most consistent of the last rho batches", _GUIDED),
    Option("rho", int, 10, "batches that guided SGD remembers, from 2", _GUIDED),
    Option("verification", int, None, "training samples that guided SGD verifies with (default: a tenth, at most 100)", _GUIDED),
    Option("on_nonfinite", str, "skip", "NaN or infinity in a gradient: skip or abort"),
    Option("eval_every", int, 1, "evaluate after so many epochs, and after the last"),
    Option("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Option("threads", int, None, "CPU threads per rank (default: the node's cores, shared)"),
    Option("slow", "list", (), "RANK:FACTOR: an artificially slow rank, which sleeps after its gradients; may be repeated"),
    Option("checkpoint_every", int, None, "steps of a rank from one checkpoint to the next, 0 for none but on a signal "
           "(default: at the end of every epoch)"),
    Option("keep", int, 2, "checkpoints that are kept, the newest ones"),
    Option("stall_seconds", int, 600, "when no rank has moved for so long, name the ones that hang, save, and end with exit "
           "code 76, or under launch --survive go on without them; 0: wait for ever", ("sync", "kstep", "async")),
    Option("resume", str, None, "auto: from the newest good checkpoint in --output, if there is one; or a checkpoint's path"),
    Option("record", bool, False, "record every step, for replay and timeline; runs of mode async can be replayed bit for bit"),
    Option("live", bool, False, "a view of all ranks on a terminal, also through mpiexec; elsewhere plain lines"),
    Option("tensorboard", bool, False, "event files for TensorBoard in the run's folder; needs the extra tensorboard"),
    Option("output", str, None, "folder of the run (default: runs/<time>-<name>)"),
    Option("name", str, None, "name of the run (default: data-model-mode)"),
)  # fmt: skip

_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "float | str": "number-or-word",
    "Sequence[float]": "floats",
}
"""What a flag takes, by the annotation of a rule's field."""


@functools.cache
def rule_options() -> tuple[Option, ...]:
    """The options of all rules, each once; the default is the rule's own. Kind and help are of the rules' classes."""
    from hpcasync.rules import RULES, Rule

    common = {f.name for f in dataclasses.fields(Rule)}
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name, rule in RULES.items():
        texts = attributes_of(rule)
        for f in dataclasses.fields(rule):
            kind = _KINDS.get(str(f.type).removesuffix(" | None"), float)
            # What a rule inherits is explained by its owner, once.
            text = attributes_of(Rule)[f.name] if f.name in common else texts.get(f.name, "")
            _, helps = found.setdefault(f.name, (kind, {}))
            helps.setdefault(text, []).append("" if f.name in common else name)
    return tuple(
        Option(n, kind, None, "; ".join(f"{', '.join(owners)}: {t}" if all(owners) else t for t, owners in helps.items()))
        for n, (kind, helps) in found.items()
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Field names are the keys; ``options`` are the rule's own keys."""

    data: str = "digits"
    model: str = "mlp"
    mode: str = "async"
    rule: str = ""
    epochs: int = 5
    batch: int = 32
    partition: str = "iid"
    seed: int = 0
    schedule: str = "constant"
    staleness: int | None = None
    progress: str | None = None
    host_ranks: int | None = None
    preset: str | None = None
    every: int | str = 32
    block_momentum: float = 0.0
    nesterov: bool = False
    block_lr: float = 1.0
    warm_start: int = 0
    inner_state: str = "keep"
    groups: int | None = None
    delay: int = 0
    collectives: str = "mpi"
    guided: bool = False
    rho: int = 10
    verification: int | None = None
    on_nonfinite: str = "skip"
    eval_every: int = 1
    device: str = "auto"
    threads: int | None = None
    slow: tuple[str, ...] = ()
    checkpoint_every: int | None = None
    keep: int = 2
    stall_seconds: int = 600
    resume: str | None = None
    record: bool = False
    live: bool = False
    tensorboard: bool = False
    output: str | None = None
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def keys(self) -> dict[str, Any]:
        """The configuration as the flat keys of a file, without those of other modes and those not set."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        foreign = {o.name for o in OPTIONS if o.modes and self.mode not in o.modes}
        foreign |= set() if self.guided else set(GUIDED_KEYS)
        flat = {k: v for k, v in flat.items() if k not in foreign} | self.options
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items() if v is not None and v != ()}


def make_config(*sources: Mapping[str, Any], workers: Callable[[], int] | None = None) -> TrainConfig:
    """Merge keys, the later sources winning, check them, and fill in what is not given.

    Args:
        sources: keys and values.
        workers: tells the number of ranks, asked only where a preset depends on it; the default asks MPI.

    Raises:
        UsageError: unknown key, wrong type, value out of range, a key of another mode.
    """
    from hpcasync.rules import make_rule

    known = {o.name: o for o in (*OPTIONS, *rule_options())}
    keys: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            key = name.replace("-", "_")
            if key not in known:
                raise unknown("option", name, known)
            if value is not None:
                keys[key] = typed_value(known[key], value)
    mode = keys.get("mode", "async")
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if keys.get("schedule", "constant") not in SCHEDULES:
        raise unknown("schedule", keys["schedule"], SCHEDULES)
    check_backend(keys.get("collectives", "mpi"))
    for key in keys:
        modes = known[key].modes
        if modes and mode not in modes:
            raise UsageError(f"--{key.replace('_', '-')} belongs to mode {', '.join(modes)}; the mode is {mode}")
    for key, least in (("epochs", 1), ("batch", 1), ("seed", 0), ("staleness", 0)):
        _at_least(keys, key, least)
    for key, least in (("groups", 1), ("eval_every", 1), ("threads", 1), ("rho", 2), ("verification", 1), ("host_ranks", 1)):
        _at_least(keys, key, least)
    for key, least in (("checkpoint_every", 0), ("keep", 1), ("stall_seconds", 0)):
        _at_least(keys, key, least)
    if "slow" in keys:
        parse_slow(keys["slow"], workers() if workers is not None else None, least=1)
    if keys.get("resume") == "auto" and "output" not in keys:
        raise UsageError("--resume auto looks for checkpoints in the run's folder: give it with --output")
    if keys.get("progress", PROGRESS[0]) not in PROGRESS:
        raise unknown("progress", keys["progress"], PROGRESS)
    if keys.get("progress") == "host-rank":
        keys.setdefault("host_ranks", 1)
    elif "host_ranks" in keys:
        raise UsageError("--host-ranks belongs to --progress host-rank; give that too, or leave it out")
    for key in ("rho", "verification"):
        if key in keys and not keys.get("guided"):
            raise UsageError(f"--{key} belongs to guided SGD; give --guided too, or leave it out")
    if "preset" in keys:
        keys = _with_preset(keys, workers or _ranks)
    if mode in _BLOCK:
        parse_every(keys.get("every", 1), "--every")
        check_delay(keys.get("delay", 0), BlockOptions(**{k: keys[k] for k in BLOCK_KEYS if k in keys}))
    rule_names = {o.name for o in rule_options()}
    options = {k: keys.pop(k) for k in list(keys) if k in rule_names}
    keys.setdefault("rule", "trend-smooth" if mode in _ASYNC else "plain")
    rule = make_rule(keys["rule"], options)
    stem = Path(str(keys.get("data", "digits"))).stem
    keys.setdefault("name", f"{stem}-{str(keys.get('model', 'mlp')).split(':')[-1]}-{mode}")
    described = {k: v for k, v in rule.describe().items() if k != "name"}
    return TrainConfig(**keys, options=described)


def _with_preset(keys: dict[str, Any], workers: Callable[[], int]) -> dict[str, Any]:
    """``keys`` with what their preset sets; given ones win."""
    name = keys["preset"]
    settings = PRESETS[name].options if name in PRESETS else {}
    ranks = workers() if settings.get("block_momentum") == "1-1/P" and "block_momentum" not in keys else 1
    given = {k: keys[k] for k in BLOCK_KEYS if k in keys}
    settings = preset_options(name, ranks, given)
    inner = PRESETS[name].rule if keys.get("rule", "plain") == "plain" else {}
    return {**inner, **keys, **settings}


def _ranks() -> int:
    from hpcasync.comm import init

    return init().size


def read_config(path: str) -> dict[str, Any]:
    """The keys of a TOML file.

    Raises:
        UsageError: not there, not TOML, tables in it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        keys = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; expected a TOML file with keys like the flags") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML ({error}); expected lines such as  epochs = 5") from error
    for key, value in keys.items():
        if isinstance(value, dict):
            raise UsageError(f"--config {path}: [{key}] is a table; expected plain keys, one per flag")
    return keys


def write_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration so that ``--config`` reads it back to the same run."""
    import tomli_w

    from hpcasync.data.atomic import replacing

    with replacing(path) as temporary:
        temporary.write_bytes(tomli_w.dumps(config.keys()).encode())


def typed_value(option: Option, value: Any) -> Any:
    """The value in the option's type; a TOML integer will do for a float."""
    kind = option.kind
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind == "floats" and _is_pair(value):
        return tuple(float(v) for v in value)
    if kind == "number-or-word" and (number or isinstance(value, str)):
        return float(value) if number else value
    if kind == "whole-or-schedule" and isinstance(value, (int, str)) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) or value.strip().isdecimal() else value
    if kind == "list" and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wanted = {"floats": "two numbers", "number-or-word": "a number or a word", int: "a whole number", float: "a number"}
    wanted |= {str: "a text", bool: "true or false", "whole-or-schedule": "a whole number or a schedule"}
    wanted |= {"list": "a list of texts"}
    raise UsageError(f"--{option.name.replace('_', '-')}={value!r}: expected {wanted[kind]}")


def _is_pair(value: Any) -> bool:
    if not isinstance(value, Iterable) or isinstance(value, str):
        return False
    items = list(value)
    return len(items) == 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in items)


def _at_least(keys: Mapping[str, Any], key: str, least: int) -> None:
    if key in keys and keys[key] < least:
        raise UsageError(f"--{key.replace('_', '-')}={keys[key]}: expected a whole number >= {least}")
