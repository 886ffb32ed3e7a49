"""One interface for all libraries and schemes, and plain autograd behind it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from conformance.plain import ADDITIVE, AFFINE_EXP, Formula, Pair, PlainChain

# What a library makes: an nn.Module whose parts only its adapter knows.
Net = Any


class CannotAskError(Exception):
    """A question that makes no sense for a library or a device; says why."""


class Adapter(ABC):
    """Builds a chain the way that a library's documentation says.

    Attributes:
        name: The column of the table.
        package: Whose version matters.
        formula: The formula of the scheme.
        ours: Whether the answers have to be right.
        reference: Whether this is plain autograd.
        stores: Whether memory grows with depth by design.
    """

    name: str
    package: str
    formula: Formula = ADDITIVE
    ours = False
    reference = False
    stores = False

    @abstractmethod
    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        """Builds a chain that maps a tensor to a tensor.

        Args:
            pairs: The branches of each block.
            split_dim: Where the input is split in two streams.
            options: What some libraries want to be told: `random=True` where branches draw random
                numbers, `passes` for the number of backward passes over one graph.
        """

    @abstractmethod
    def pairs(self, net: Net) -> list[Pair]:
        """Lists the branches in a chain."""

    @abstractmethod
    def blocks(self, net: Net) -> list[nn.Module]:
        """Lists the parts of a chain that are called one after the other."""

    def call(self, net: Net, x: Tensor, **kwargs: Tensor) -> Tensor:
        """Calls a chain with extra tensors for all branches."""
        y: Tensor = net(x, **kwargs)
        return y

    def tap(self, net: Net, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Returns a block's output, as one tensor, and the chain's."""
        taken: list[Any] = []
        handle = self.blocks(net)[index].register_forward_hook(lambda *args: taken.append(args[2]))
        y = net(x)
        handle.remove()
        middle = taken[0]
        return torch.cat(middle[:2], 1) if isinstance(middle, (tuple, list)) else middle, y

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        """Runs a chain backwards."""
        raise CannotAskError("has no inverse")

    def keep_inputs(self, net: Net) -> None:
        """Makes every second block keep its input."""
        raise CannotAskError("has no option to keep a block's input")

    def streams(self, net: Net, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Calls a chain with two tensors."""
        raise CannotAskError("takes one tensor, not two streams")

    def affine(self) -> Adapter:
        """Returns the same with the coupling `a * exp(t) + t`."""
        raise CannotAskError("has the additive coupling alone")


class Plain(Adapter):
    """Plain autograd."""

    name = "plain"
    package = "torch"
    reference = True
    stores = True

    def __init__(self, formula: Formula) -> None:
        self.formula = formula

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        return PlainChain(pairs, self.formula, split_dim)

    def pairs(self, net: Net) -> list[Pair]:
        return [(block.f, block.g) for block in net.blocks]

    def blocks(self, net: Net) -> list[nn.Module]:
        return list(net.blocks)

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        x: Tensor = net.inverse(y)
        return x

    def keep_inputs(self, net: Net) -> None:
        pass  # keeps them all

    def streams(self, net: Net, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = net(torch.cat((x1, x2), net.split_dim)).chunk(2, net.split_dim)
        return y1, y2

    def affine(self) -> Adapter:
        other = copy.copy(self)
        other.formula = AFFINE_EXP
        return other
