"""Your own model and data: start with ``mpiexec -n 4 python own_model.py``, or with plain python as one rank."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpcasync as ha

world = ha.init()  # ranks, nodes, the device of this rank
torch.manual_seed(0)
x = torch.randn(2048, 20)
y = (x[:, :5].sum(dim=1) > 0).long()
dataset = TensorDataset(x, y)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(world.device)
optimizer = ha.Async(model, ha.rules.TrendSmooth(lr=0.05), staleness=16)
sampler = ha.data.ShardSampler(dataset, world)  # this rank's share
loader = DataLoader(dataset, batch_size=32, sampler=sampler)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs.to(world.device)), labels.to(world.device)).backward()
        optimizer.step()  # pushes this rank's gradient, reads what the others have done
    optimizer.synchronize()  # the same model on every rank
    if world.rank == 0:
        accuracy = (model(x.to(world.device)).argmax(dim=1).cpu() == y).float().mean()
        print(f"epoch {epoch + 1}: accuracy {100 * accuracy:.1f} %, staleness {optimizer.staleness.summary()['mean']:.2f}")
optimizer.close()
