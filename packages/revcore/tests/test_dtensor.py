"""Streams that are spread over processes; one process suffices to see how they are."""

import pytest
import torch
import torch.distributed as dist
from cases import Log
from torch import nn

import revcore


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - takes seconds

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Spread(nn.Module):
    """Computes with what its process has, and gives a result that is spread along the tokens."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), Log()

    def forward(self, x):
        from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

        self.seen.append(x.placements)
        t = self.linear(x.to_local()).tanh()
        whole = DTensor.from_local(t, x.device_mesh, x.placements)
        return whole.redistribute(placements=[Shard(1)])


@pytest.mark.parametrize("coupling", ["additive", "affine", "fixed_point"])
def test_both_runs_see_a_stream_spread_in_the_same_way(coupling, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: PLC0415

    if coupling == "fixed_point" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("torch 2.6 cannot look at the bits of a DTensor; 2.11 is the oldest tried")
    chain = revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(Spread(), coupling=coupling, split_dim=-1) for _ in range(2)),
        split_dim=-1,
    )
    chain.double()
    x, found = torch.randn(2, 6, 8, dtype=torch.float64), []
    for reversing in (True, False):
        revcore.set_reversing(chain, reversing).zero_grad()
        y = chain(distribute_tensor(x, mesh, [Replicate()]))
        y.square().sum().backward()
        found.append([p.grad for p in chain.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    logs = [part.seen for part in chain.modules() if isinstance(part, Spread)]
    assert len(logs) == 4
    for first, second, stored in logs:
        assert first == second == stored
