"""A Horovod script, moved. The lines that went are comments. Horovod may go on doing the sums: collectives="horovod"."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpcasync as ha

# hvd.init()
# torch.cuda.set_device(hvd.local_rank())
world = ha.init()  # takes the GPU of the local rank where there is one
torch.manual_seed(0)
x = torch.randn(1024, 20)
dataset = TensorDataset(x, (x[:, :5].sum(dim=1) > 0).long())

# sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
sampler = ha.data.ShardSampler(dataset, world)
loader = DataLoader(dataset, batch_size=32, sampler=sampler)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(world.device)
inner = torch.optim.SGD(model.parameters(), lr=0.05 * world.size)
# optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())
# hvd.broadcast_parameters(model.state_dict(), root_rank=0)
# hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = ha.Sync(inner, model=model)  # rank 0's model is everybody's from here on

for epoch in range(2):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(world.device)), labels.to(world.device))
        loss.backward()
        optimizer.step()
    optimizer.synchronize()
    # if hvd.rank() == 0:
    if world.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
optimizer.close()
