"""A DistributedDataParallel script, moved. The lines that went are comments; start it with mpiexec in place of torchrun."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpcasync as ha

# dist.init_process_group("gloo")
world = ha.init()
torch.manual_seed(0)
x = torch.randn(1024, 20)
dataset = TensorDataset(x, (x[:, :5].sum(dim=1) > 0).long())

# sampler = DistributedSampler(dataset)
sampler = ha.data.ShardSampler(dataset, world)
loader = DataLoader(dataset, batch_size=32, sampler=sampler)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(world.device)
inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
# model = DistributedDataParallel(model)
optimizer = ha.Sync(inner, model=model)  # the same averages, in buckets, during backward
# optimizer = ha.KStep(inner, model=model, every=16, block_momentum=0.5)  # an average every 16 steps
# optimizer = ha.Async(model, ha.rules.TrendSmooth(base="momentum", lr=0.05))  # nobody waits for anybody

for epoch in range(2):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(world.device)), labels.to(world.device))
        loss.backward()
        optimizer.step()
    optimizer.synchronize()
    if world.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
# dist.destroy_process_group()
optimizer.close()
