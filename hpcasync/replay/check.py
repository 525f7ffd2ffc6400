"""Whether a record can be replayed here: its mode and rule, the data, the code, the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcasync import models
from hpcasync.data import Dataset, open_dataset
from hpcasync.errors import UsageError
from hpcasync.rules import Rule, make_rule
from hpcasync.train.code_version import code_version
from hpcasync.train.config import TrainConfig, make_config
from hpcasync.train.record import arrays_digest, model_arrays
from hpcasync.train.record_file import RankRecord


def config_of(records: list[RankRecord]) -> TrainConfig:
    """The configuration that was recorded."""
    return make_config(records[0].facts["config"])


def check_replayable(run: Path, records: list[RankRecord], config: TrainConfig) -> Rule:
    """The rule, bound to the ranks.

    Raises:
        UsageError: naming why the run can't be replayed.
    """
    if config.mode != "async":
        raise UsageError(
            f"{run} is a run of mode {config.mode}, which is not replayed: "
            + (
                "its groups' averages are not recorded"
                if config.mode == "hierarchical"
                else "its ranks work in step, so the same command gives the same bits again"
            )
            + f". A timeline there is: hpcasync timeline {run}"
        )
    rule = make_rule(config.rule, config.options).bind(len(records))
    if rule.lock_free:
        raise UsageError(
            f"{run}: rule {rule.name!r} works without locks: ranks overwrite each other's elements in an order that nothing can "
            "record, so the run can't be replayed"
        )
    device = records[0].facts["device"]
    if device != "cpu":
        raise UsageError(f"{run} was recorded on {device}, whose kernels add in no fixed order; replay is of CPU runs")
    return rule


def open_data(run: Path, record: RankRecord, config: TrainConfig, data: str | None) -> Dataset:
    """The data set that was recorded.

    Args:
        data: name or path to take in its place; it must hold the same.

    Raises:
        UsageError: not there, or another checksum.
    """
    if data is None:  # a relative path may have been from another folder
        data = record.facts["data_path"] if Path(record.facts["data_path"]).exists() else config.data
    dataset = open_dataset(data)
    if dataset.header.checksum != record.facts["data"]:
        raise UsageError(
            f"{run} was trained on data with the checksum {record.facts['data']} ({record.facts['data_path']}), "
            f"{dataset.path} has {dataset.header.checksum}; give the same data with --data"
        )
    return dataset


def build_model(run: Path, record: RankRecord, config: TrainConfig, dataset: Dataset, *, any_code: bool) -> nn.Module:
    """The model at the start of the run.

    Raises:
        UsageError: the code, the libraries or the model are others than recorded.
    """
    torch.manual_seed(config.seed)
    model = models.build(config.model, dataset.shape, dataset.classes).train()
    then, now = record.facts["code"], code_version(config.model)
    differ = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    if differ and not any_code:
        raise UsageError(
            f"{run} was recorded by other code: {'; '.join(differ)}. Check out that version, or give --any-code to see whether "
            "it matters"
        )
    _check_start(run, record.facts, model)
    return model


def _check_start(run: Path, facts: dict[str, Any], model: nn.Module) -> None:
    found = arrays_digest(model_arrays(model))
    if found != facts["start_sha256"]:
        raise UsageError(
            f"{run}: the model starts from other parameters than recorded (SHA-256 {found[:16]}..., expected "
            f"{facts['start_sha256'][:16]}...): does building it depend on more than the seed?"
        )
