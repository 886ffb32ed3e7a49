"""What all tests share: the schemes, the branches, and plain autograd as the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore


class Attention(nn.Module):
    """Pre-norm self-attention, the first half of a transformer block."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Mixing(revcore.Coupling):
    """Arithmetic that autocast casts: on the CPU the product, on a GPU the exponential, too."""

    def scale_shift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(t.tanh()), t @ torch.full((4, 4), 0.1, device=t.device)

    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.scale_shift(t)
        return a * scale + shift

    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.scale_shift(t)
        return (a - shift) / scale


class Log(list):
    """A list that nobody puts back, in which a module can note all that it does."""


traceable = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="the tracer of torch 2.6 cannot follow a chain; 2.11 is the oldest that was tried",
)


def mlp(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, out))


def conv_branch(dim: int, width: int, out: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    return nn.Sequential(
        norm(width), nn.ReLU(inplace=True), conv(width, 5, 3, padding=1), nn.GELU(), conv(5, out, 1)
    )


@dataclass(frozen=True)
class Kind:
    """A kind of branch, and an input of the stream's shape for it."""

    branch: Callable[[int, int], nn.Module]
    shape: tuple[int, ...]  # of one stream
    split_dim: int


KINDS = {
    "mlp": Kind(mlp, (5, 4), 1),
    "conv1d": Kind(partial(conv_branch, 1), (3, 4, 6), 1),
    "conv2d": Kind(partial(conv_branch, 2), (3, 4, 5, 4), 1),
    "conv3d": Kind(partial(conv_branch, 3), (2, 4, 3, 3, 2), 1),
    "transformer": Kind(Attention, (2, 5, 4), -1),
}


@dataclass(frozen=True)
class SchemeCase:
    """A scheme, how much wider its branches' outputs are, and its formula written by hand."""

    coupling: Callable[..., revcore.Coupling]
    factor: int
    formula: Callable[[Tensor, Tensor, int], Tensor]


def _additive(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return a + t


def _affine_exp(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return a * torch.exp(t) + t


def _affine_sigmoid(a: Tensor, t: Tensor, dim: int) -> Tensor:
    even = torch.arange(0, t.shape[dim], 2, device=t.device)
    shift, log_odds = t.index_select(dim, even), t.index_select(dim, even + 1)
    return a / (1 + torch.exp(-log_odds - 2)) + shift


def _sigmoid_coupling(f: nn.Module, g: nn.Module, split_dim: int = 1) -> revcore.Coupling:
    adapter = partial(revcore.sigmoid_adapter, split_dim=split_dim)
    return revcore.AffineCoupling(f, g, adapter=adapter, split_dim=split_dim)


def _affine_bounded(a: Tensor, t: Tensor, dim: int) -> Tensor:
    half = t.shape[dim] // 2
    log_scale, shift = t.narrow(dim, 0, half), t.narrow(dim, half, half)
    return a * torch.exp(4 / torch.pi * torch.atan(log_scale / 2)) + shift


def _bounded_coupling(f: nn.Module, g: nn.Module, split_dim: int = 1) -> revcore.Coupling:
    adapter = partial(revcore.bounded_adapter, split_dim=split_dim)
    return revcore.AffineCoupling(f, g, adapter=adapter, split_dim=split_dim)


# In float64 this grid is so fine that the formula need not know of it.
_fixed_point = partial(revcore.FixedPointCoupling, fraction_bits=40)

SCHEMES = {
    "additive": SchemeCase(revcore.AdditiveCoupling, 1, _additive),
    "affine-exp": SchemeCase(revcore.AffineCoupling, 1, _affine_exp),
    "affine-sigmoid": SchemeCase(_sigmoid_coupling, 2, _affine_sigmoid),
    "affine-bounded": SchemeCase(_bounded_coupling, 2, _affine_bounded),
    "fixed-point": SchemeCase(_fixed_point, 1, _additive),
}


@dataclass
class Case:
    """A chain to test, and the same function written as plain PyTorch."""

    chain: revcore.ReversibleSequential
    formula: Callable[[Tensor, Tensor, int], Tensor]
    x: Tensor
    split_dim: int

    def plain(self, x: Tensor, chain: revcore.ReversibleSequential | None = None) -> Tensor:
        """The reference: no line of it is shared with the engine."""
        dim = self.split_dim
        x1, x2 = x.chunk(2, dim)
        for block in self.chain if chain is None else chain:
            coupling = block.coupling
            x1 = self.formula(x1, coupling.f(x2.clone()), dim)
            x2 = self.formula(x2, coupling.g(x1.clone()), dim)
        return torch.cat((x1, x2), dim)

    def twin(self) -> revcore.ReversibleSequential:
        return copy.deepcopy(self.chain)


def make_case(
    scheme: str = "additive",
    kind: str = "conv2d",
    depth: int = 3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Case:
    case, branch = SCHEMES[scheme], KINDS[kind]
    width = branch.shape[branch.split_dim]
    coupling = case.coupling
    if scheme == "fixed-point" and dtype != torch.float64:
        coupling = revcore.FixedPointCoupling
    blocks = [
        revcore.ReversibleBlock(
            branch.branch(width, width * case.factor),
            branch.branch(width, width * case.factor),
            coupling=coupling,
            split_dim=branch.split_dim,
        )
        for _ in range(depth)
    ]
    chain = revcore.ReversibleSequential(*blocks, split_dim=branch.split_dim)
    shape = list(branch.shape)
    shape[branch.split_dim] *= 2
    return Case(
        chain.to(device, dtype),
        case.formula,
        torch.randn(shape, dtype=dtype, device=device),
        branch.split_dim,
    )


def loss_of(y: Tensor) -> Tensor:
    """A loss whose gradient is different at every element."""
    weight = torch.linspace(0.5, 1.5, max(y.numel(), 1), dtype=y.dtype, device=y.device)
    return (y.sin() * weight[: y.numel()].view_as(y)).sum()


def gradients(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> dict[str, Tensor | None]:
    """Output, gradients of input and parameters, and buffers after one step."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    loss_of(y).backward()
    results: dict[str, Tensor | None] = {"output": y.detach(), "input": x.grad}
    results |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    results |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    return results


def assert_same(
    ours: dict[str, Tensor | None], plain: dict[str, Tensor | None], tolerance: float = 1e-9
) -> None:
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        got = ours[name]
        if expected is None or got is None:
            assert got is expected, name
            continue
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def chain_of_branches(branch: nn.Module, blocks: int = 2) -> revcore.ReversibleSequential:
    """Makes a chain of blocks of copies of a branch, for inputs of twice its width."""
    return revcore.ReversibleSequential(
        *(revcore.ReversibleBlock(copy.deepcopy(branch)) for _ in range(blocks))
    )


def step_of(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Runs forward and backward; returns the output and all gradients."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in net.parameters())]  # type: ignore[list-item]


def assert_as_stored(
    make: Callable[[], nn.Module],
    x: Tensor,
    take: Callable[[nn.Module, Tensor], list[Tensor]] = step_of,
    steps: int = 2,
) -> nn.Module:
    """Takes steps with a chain and with its stored twin; gradients and buffers agree."""
    torch.manual_seed(0)
    chain = make().double().to(x.device)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    for number in range(steps):
        found = []
        for net in (chain, twin):
            torch.manual_seed(number)
            found.append([*take(net, x), *(b.double() for b in net.buffers())])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    return chain


def compiled(module: nn.Module, *, fullgraph: bool = True) -> Callable[..., Any]:
    """Compiles a module to ask whether it can be traced and differentiated, whatever the code."""
    backend = "aot_eager_decomp_partition"
    found: Callable[..., Any] = torch.compile(module, backend=backend, fullgraph=fullgraph)
    return found


def fixed_point_chain(branch, depth, fraction_bits=16):
    couplings = (
        revcore.FixedPointCoupling(branch(), branch(), fraction_bits=fraction_bits)
        for _ in range(depth)
    )
    return revcore.ReversibleSequential(*couplings)


def same_bits(a, b):
    """Also tells 0.0 from -0.0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))
