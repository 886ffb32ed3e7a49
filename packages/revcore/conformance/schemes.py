"""Our own schemes; to add one, add a line to `OURS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import revcore
from conformance.adapters import Adapter, CannotAskError, Net
from conformance.plain import (
    ADDITIVE,
    AFFINE_BOUNDED,
    AFFINE_EXP,
    AFFINE_SIGMOID,
    Formula,
    Pair,
)


class Ours(Adapter):
    """A coupling in revcore's chain."""

    package = "revcore"
    ours = True

    def __init__(
        self,
        name: str,
        coupling: Callable[..., revcore.Coupling],
        formula: Formula,
        *,
        stores: bool = False,
    ) -> None:
        self.name, self.coupling, self.formula, self.stores = name, coupling, formula, stores

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        blocks = (
            revcore.ReversibleBlock(f, g, coupling=self.coupling, split_dim=split_dim)
            for f, g in pairs
        )
        chain = revcore.ReversibleSequential(*blocks, split_dim=split_dim)
        return revcore.set_reversing(chain, not self.stores)

    def affine(self) -> Adapter:
        raise CannotAskError("the affine couplings have columns of their own")

    def pairs(self, net: Net) -> list[Pair]:
        return [(block.coupling.f, block.coupling.g) for block in net]

    def blocks(self, net: Net) -> list[nn.Module]:
        return list(net)

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        x: Tensor = net.inverse(y)
        return x

    def keep_inputs(self, net: Net) -> None:
        for block in net[::2]:
            block.keep_input = True

    def streams(self, net: Net, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = net(x1, x2)
        return y1, y2


def _sigmoid(f: nn.Module, g: nn.Module, split_dim: int = 1) -> revcore.Coupling:
    adapter = partial(revcore.sigmoid_adapter, split_dim=split_dim)
    return revcore.AffineCoupling(f, g, adapter=adapter, split_dim=split_dim)


def _bounded(f: nn.Module, g: nn.Module, split_dim: int = 1) -> revcore.Coupling:
    adapter = partial(revcore.bounded_adapter, split_dim=split_dim)
    return revcore.AffineCoupling(f, g, adapter=adapter, split_dim=split_dim)


def _fixed_point(f: nn.Module, g: nn.Module, split_dim: int = 1) -> revcore.Coupling:
    # In float64 the grid is so fine that the formula need not know of it.
    fine = any(parameter.dtype == torch.float64 for parameter in f.parameters())
    bits = 40 if fine else 16
    return revcore.FixedPointCoupling(f, g, split_dim=split_dim, fraction_bits=bits)


OURS: list[Adapter] = [
    Ours("additive", revcore.AdditiveCoupling, ADDITIVE),
    Ours("affine (exp)", revcore.AffineCoupling, AFFINE_EXP),
    Ours("affine (sigmoid)", _sigmoid, AFFINE_SIGMOID),
    Ours("affine (bounded)", _bounded, AFFINE_BOUNDED),
    Ours("fixed point", _fixed_point, ADDITIVE),
    Ours("additive, stored", revcore.AdditiveCoupling, ADDITIVE, stores=True),
]
