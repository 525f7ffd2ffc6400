"""Whether the tables of a record belong to the model and the data that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from hpcasync.errors import UsageError
from hpcasync.kernels import HYPER
from hpcasync.store import make_layout
from hpcasync.train.record import model_arrays
from hpcasync.train.record_file import RankRecord


def check_tables(records: Sequence[RankRecord], model: nn.Module, samples: int) -> None:
    """Find what a replay would stumble over.

    Args:
        records: of all ranks.
        model: of the run.
        samples: in the training split.

    Raises:
        UsageError: naming the file and what is wrong in it.
    """
    for record in records:
        for problem in _problems(record, records[0], model, samples):
            raise UsageError(f"{record.path} is damaged: {problem}; copy it again")


def _problems(record: RankRecord, first: RankRecord, model: nn.Module, samples: int) -> Iterator[str]:
    facts = record.facts
    for name in ("shard_elements", "threads", "shards", "ranks"):
        if not isinstance(facts.get(name), int) or facts[name] < 1:
            yield f"its fact {name} is {facts.get(name)!r}"
    groups, sizes = facts.get("groups"), [p.numel() for p in model.parameters()]
    if not isinstance(groups, list) or not all(isinstance(n, int) and n > 0 for n in groups) or sum(groups) != len(sizes):
        yield f"its groups of parameters are {groups!r}, the model has {len(sizes)}"
    if any(facts.get(name) != first.facts.get(name) for name in ("shard_elements", "threads", "shards", "ranks", "groups")):
        yield "its facts are others than those of rank 0"
    shards = len(make_layout(sizes, facts["shard_elements"]).shards)
    if record.versions.shape[1:] != (shards,) or facts["shards"] != shards:
        yield f"it has {record.versions.shape[1:]} shards, the model has {shards}"
    if record.hypers.shape[1:] != (len(groups), len(HYPER)):  # type: ignore[arg-type]
        yield f"its hyper-parameters have shape {record.hypers.shape[1:]}"
    if (np.asarray(record.samples) < 0).any() or (record.samples >= samples).any():
        yield f"it has samples beyond the {samples} of the data"
    if record.random.dtype != np.uint8 or record.random.shape != tuple(torch.get_rng_state().shape):
        yield "its state of torch's generator has another size"
    if not isinstance(record.end.get("deaths", []), list):
        yield "its deaths are no list"
    if record.closed and not isinstance(record.end.get("parameters_sha256"), str):
        yield "it has no SHA-256 of the parameters"
    if record.closed and record is first:
        arrays = model_arrays(model)
        if {n: (a.dtype, a.shape) for n, a in record.final.items()} != {n: (a.dtype, a.shape) for n, a in arrays.items()}:
            yield "its final model has other arrays than the model"
