"""Forward and backward pass as one CUDA graph, with and without overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import revcore

CHANNELS = 32


def conv() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
    )


class Swap(nn.Module):
    """Exchanges the halves of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(x.shape[1] // 2, 1)

    def inverse(self, y: Tensor) -> Tensor:
        return self.forward(y)


def blocks(coupling: str, count: int) -> list[nn.Module]:
    return [revcore.ReversibleBlock(conv(), conv(), coupling) for _ in range(count)]


def anchored(coupling: str, count: int) -> list[nn.Module]:
    return [
        revcore.ReversibleBlock(conv(), conv(), coupling, keep_input=index % 2 == 1)
        for index in range(count)
    ]


def mixed(coupling: str, count: int) -> list[nn.Module]:
    return [part for block in blocks(coupling, count) for part in (block, Swap())]


class Widened(nn.Module):
    """A branch with a chain inside, whose backward pass runs on either of the two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = revcore.ReversibleSequential(*blocks("additive", 2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.chain(torch.cat((x, x), 1)).chunk(2, 1)
        return (first + second) / 2


def nested(coupling: str, count: int) -> list[nn.Module]:
    return [revcore.ReversibleBlock(Widened(), conv(), coupling) for _ in range(count)]


CHAINS: list[tuple[Callable[[str, int], list[nn.Module]], str]] = [
    (blocks, "additive"),
    (blocks, "affine"),
    (blocks, "fixed_point"),
    (anchored, "additive"),
    (mixed, "additive"),
    (nested, "additive"),
]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(("make", "coupling"), CHAINS)
def test_a_graph_computes_what_python_does(
    make: Callable[[str, int], list[nn.Module]],
    coupling: str,
    depth: int,
    overlap: bool,
    device: torch.device,
) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    chain = revcore.ReversibleSequential(*make(coupling, depth)).to(device)
    chain.overlap = overlap
    if coupling == "affine":
        for parameter in chain.parameters():
            parameter.data.mul_(0.3)
    parameters = list(chain.parameters())

    def step(x: Tensor) -> list[Tensor]:
        y = chain(x)
        loss = (y * y).mean()
        return [loss.detach(), *torch.autograd.grad(loss, [x, *parameters])]

    batches = [torch.randn(64, 2 * CHANNELS, 32, 32, device=device) for _ in range(4)]
    given = batches[0].clone().requires_grad_()
    for _ in range(2):
        step(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(given)
    for batch in batches * 3:
        with torch.no_grad():
            given.copy_(batch)
        graph.replay()
        ours = [tensor.clone() for tensor in found]
        wanted = step(batch.clone().requires_grad_())
        for one, two in zip(ours, wanted, strict=True):
            # The same kernels; only cuDNN may choose others while a graph is captured.
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_graph_with_overlap_ends_where_it_is_asked_to(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    chain = revcore.ReversibleSequential(*blocks("additive", 4)).to(device)
    last = list(chain[3].parameters())
    given = torch.randn(8, 2 * CHANNELS, 8, 8, device=device, requires_grad=True)
    wanted = torch.autograd.grad(chain(given).square().mean(), last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The step that is rebuilt ahead of the end is never differentiated.
        found = torch.autograd.grad(chain(given).square().mean(), last)
    graph.replay()
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
