"""What is measured: modes and rules, with a fixed batch per rank (weak) or for all ranks together (strong)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpcasync.errors import UsageError, unknown
from hpcasync.rules import make_rule
from hpcasync.train import TrainConfig, make_config

KINDS = ("weak", "strong")
BLOCK_TAKERS = {"every": ("kstep", "hierarchical"), "collectives": ("sync", "kstep", "hierarchical")}
"""Keys of averages, each with the modes that take it."""
BASE = "torch"
"""In place of a mode: one process with a plain torch loop, what efficiencies refer to."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        kind: ``"weak"`` or ``"strong"``.
        name: ``mode`` or ``mode:rule``, or ``"torch"``.
        config: resolved; its batch is a rank's.
    """

    kind: str
    name: str
    config: TrainConfig


def make_cases(
    names: Sequence[str],
    kinds: Sequence[str],
    keys: dict[str, Any],
    *,
    batch: int,
    global_batch: int,
    ranks: int,
    nodes: int = 1,
    block: dict[str, Any] | None = None,
) -> list[Case]:
    """The cases for this number of ranks; on one rank the base comes first.

    Args:
        names: such as ``"sync"``, ``"async:asgd"``, ``"kstep"``.
        kinds: of `KINDS`.
        keys: of the training, the same for all.
        batch: samples per step of a rank, weak scaling.
        global_batch: samples per step of all ranks, strong scaling.
        ranks: how many there are.
        nodes: they are on; on several a group of mode hierarchical is a node, on one there are two groups.
        block: keys of the synchronous modes, ``every`` and ``collectives``; a case takes those that it has.

    Raises:
        UsageError: an unknown name or kind; a global batch that the ranks can't share equally.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of scaling", kind, KINDS)
    if "strong" in kinds and global_batch % ranks:
        raise UsageError(f"--global-batch {global_batch} can't be shared by {ranks} ranks; give a multiple of {ranks}")
    cases = []
    for kind in kinds:
        own = batch if kind == "weak" else global_batch // ranks
        if ranks == 1:
            cases.append(Case(kind, BASE, make_config(keys, {"mode": "sync", "batch": own})))
        for name in names:
            mode, _, rule = name.partition(":")
            chosen = {"mode": mode, "batch": own, **({"rule": rule} if rule else {})}
            chosen |= {k: v for k, v in (block or {}).items() if mode in BLOCK_TAKERS[k]}
            if mode == "hierarchical" and nodes == 1:
                chosen["groups"] = 2 if ranks % 2 == 0 else 1
            cases.append(Case(kind, name, make_config(keys, chosen, workers=lambda: ranks)))
    return cases


def tried(config: TrainConfig, rates: Sequence[float]) -> list[TrainConfig]:
    """The configuration with each of these learning rates; as it is if there are none.

    Raises:
        UsageError: a rate that the rule does not take.
    """
    found = [replace(config, options={**config.options, "lr": rate}) for rate in rates] or [config]
    for one in found:
        make_rule(one.rule, one.options)
    return found
