"""A small module and its data, for the programs of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import BinaryAccuracy

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def data(count: int = 256) -> TensorDataset:
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, :3].sum(1) > 0).float())


def batches(shuffle: bool = True, sampler: Any = None) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=16, shuffle=shuffle and sampler is None, sampler=sampler)


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class Net(L.LightningModule):
    """Dense layers with BatchNorm and dropout, by default with SGD and a schedule per step."""

    def __init__(self, optimizer: Callable[[nn.Module], Any] = sgd, dropout: float = 0.0) -> None:
        super().__init__()
        self.make = optimizer
        self.body = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.accuracy = BinaryAccuracy()

    def loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        scores = self.body(x).squeeze(1)
        return F.binary_cross_entropy_with_logits(scores, y), scores

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.loss(batch)[0]

    def validation_step(self, batch: Any, index: int) -> None:
        loss, scores = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        self.log("own_loss", loss)
        self.accuracy(scores, batch[1].int())
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_hand(net: Net, wrap: Callable[[Any], Any], *, epochs: int, clip: float, accumulate: int) -> None:
    """Train ``net`` as a script of hpcasync without Lightning does."""
    made = net.configure_optimizers()
    mode, schedule = wrap(made["optimizer"]), made["lr_scheduler"]["scheduler"]
    world = mode.world
    sampler = DistributedSampler(data(), num_replicas=world.size, rank=world.rank)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(batches(sampler=sampler)):
            if i % accumulate == 0:
                mode.zero_grad()
            loss = net.training_step(batch, i) / accumulate
            if (i + 1) % accumulate:
                with mode.no_sync():
                    loss.backward()
                continue
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            mode.step()
            schedule.step()
        mode.synchronize()
    mode.close()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same bits."""
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
