"""Each rank has five of the ten digits: GSGM against plain asynchronous SGD. Start it with mpiexec -n 4, or -n 2."""

import torch
import torch.nn.functional as F

import hpcasync as ha

world = ha.init()
for rule in (ha.rules.ASGD(lr=0.05), ha.rules.GSGM(lr=0.05)):
    torch.manual_seed(0)
    model = ha.models.build("mlp", (1, 8, 8), 10).to(world.device)
    optimizer = ha.Async(model, rule, world=world)
    batches = ha.data.loader("digits", world, batch=32, partition="shards:5")
    for epoch in range(10):
        batches.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(world.device)), y.to(world.device)).backward()
            optimizer.step()
    optimizer.synchronize()
    right = seen = 0
    if world.rank == 0:
        for x, y in ha.data.loader("digits", None, batch=64, split="test"):
            right += (model(x.to(world.device)).argmax(dim=1).cpu() == y).sum().item()
            seen += len(y)
        print(f"{rule.name}: {100 * right / seen:.1f} % of the test digits")
    optimizer.close()
