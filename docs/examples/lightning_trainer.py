"""A Lightning module on all ranks: ``mpiexec -n 4 python lightning_trainer.py``. One line is of hpcasync."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpcasync as ha


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        accuracy = (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)  # the mean over all ranks

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


torch.manual_seed(0)
x = torch.randn(2048, 20)
dataset = TensorDataset(x, (x[:, :5].sum(dim=1) > 0).long())
train, validate = DataLoader(dataset, batch_size=32, shuffle=True), DataLoader(dataset, batch_size=256)

strategy = ha.lightning.HPCAsyncStrategy("async", rule="trend-smooth", staleness=16)
# strategy = ha.lightning.HPCAsyncStrategy("sync")  # what "ddp" does
# strategy = ha.lightning.HPCAsyncStrategy("kstep", every=16, block_momentum=0.5)
trainer = L.Trainer(strategy=strategy, max_epochs=4, gradient_clip_val=1.0, enable_progress_bar=False, logger=False)
trainer.fit(Classifier(), train, validate)  # each rank takes its share of the data

if trainer.is_global_zero:
    accuracy, mode = float(trainer.callback_metrics["accuracy"]), strategy.optimizer
    print(f"accuracy {100 * accuracy:.1f} %, {mode.updates} updates of rank 0, staleness {mode.staleness.summary()['mean']:.2f}")
