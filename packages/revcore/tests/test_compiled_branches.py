"""Branches under torch.compile, in a chain that the eager engine reverses."""

import copy

import pytest
import torch
from cases import traceable
from torch import nn

import revcore

pytestmark = [traceable, pytest.mark.usefixtures("fresh_compiler")]


class Tokens(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(4), nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))


class Scale(nn.Module):
    """Is invertible."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return x * self.weight

    def inverse(self, y):
        return y / self.weight


@pytest.mark.parametrize("accumulates", [False, True])
def test_branches_whose_cuda_graphs_take_the_memory_of_the_run_before(accumulates, device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    torch.manual_seed(0)
    blocks = [revcore.ReversibleBlock(Tokens(), coupling="additive") for _ in range(2)]
    chain = revcore.ReversibleSequential(*blocks, Scale(), Scale()).to(device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for block in blocks:
        block.coupling.f.compile(mode="reduce-overhead")
        block.coupling.g.compile(mode="reduce-overhead")
    for module in chain[2:]:
        module.compile(mode="reduce-overhead")
    for _ in range(4):
        found = []
        for net in (chain, twin):
            if not accumulates:
                net.zero_grad()
            net(torch.linspace(-2, 2, 48, device=device).view(6, 8)).square().mean().backward()
            found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_random_numbers_in_a_cuda_graph_are_refused(mode, in_place, device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    chain = revcore.ReversibleBlock(nn.Sequential(Tokens(), nn.Dropout(0.5)), Tokens()).to(device)
    branch = chain.coupling.f
    if in_place:
        branch.compile(mode=mode)
    else:
        chain.coupling.f = torch.compile(branch, mode=mode)
    x = torch.randn(6, 8, device=device)
    if mode == "reduce-overhead":
        with pytest.raises(RuntimeError, match="draws random numbers in a CUDA graph"):
            chain(x)
        branch.eval()
    chain(x).sum().backward()


class Deciding(nn.Linear):
    """Decides by what rounding turns over, once."""

    def forward(self, x):
        (mask,) = revcore.remember(lambda: ((x * 1e15).sin() > 0,))
        return super().forward(x) * mask


def test_what_a_compiled_branch_remembers(device):
    torch.manual_seed(0)
    blocks = [revcore.ReversibleBlock(Deciding(4, 4)) for _ in range(4)]
    chain = revcore.ReversibleSequential(*blocks).double().to(device)
    x = torch.randn(16, 8, dtype=torch.float64, device=device, requires_grad=True)
    leaves, found = [x, *chain.parameters()], []
    for compiles in (False, True):
        for block in blocks if compiles else ():
            block.coupling.f.compile(backend="aot_eager")
            block.coupling.g.compile(backend="aot_eager")
        found.append(torch.autograd.grad(chain(x).sin().sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
