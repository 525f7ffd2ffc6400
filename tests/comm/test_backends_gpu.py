"""Sync and KStep with the model on a GPU that all ranks share: the same training as on the CPU, with every backend."""

from __future__ import annotations

import pytest
import torch

from hpcasync.comm import BACKENDS
from tests.comm.test_backends import HEAD, need
from tests.mpi import Lane, MpiRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU here"),
]

CODE = """
world = ha.init(device="cuda")
def train(mode, device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 70), torch.nn.ReLU(), torch.nn.Linear(70, 3)).to(device)
    inner = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    if mode == "kstep":
        opt = ha.KStep(inner, every=3, block_momentum=0.5, model=net, collectives=NAME)
    else:
        opt = ha.Sync(inner, model=net, collectives=NAME, bucket_mb=0.002)
    for bucket in opt._buckets if mode == "sync" and device != "cpu" else ():
        assert bucket.memory.device == (world.device if bucket.direct else torch.device("cpu"))
        assert bucket.direct or bucket.memory.is_pinned()
    data = torch.Generator().manual_seed(me)
    for _ in range(20):
        x = torch.randn(8, 20, generator=data)
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x.to(device)), x[:, :3].argmax(1).to(device)).backward()
        opt.step()
    opt.synchronize()
    shares = opt.share.shares()
    opt.close()
    flat = torch.cat([p.detach().cpu().reshape(-1) for p in net.parameters()])
    assert same_everywhere(flat), (mode, device)
    return flat, shares
for mode in ("sync", "kstep"):
    (gpu, shares), (host, _) = train(mode, world.device), train(mode, "cpu")
    assert torch.allclose(gpu, host, atol=1e-4), mode
    print(mode, NAME, shares)
print("done")
"""


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_a_shared_gpu(mpirun: MpiRun, lane: Lane, backend: str, n: int) -> None:
    need(backend, lane)
    done = mpirun(HEAD + CODE, n, args=[backend], timeout=250)
    assert done.stdout.count("done") == n
