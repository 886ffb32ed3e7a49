"""The reference: a chain of couplings in plain PyTorch, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[nn.Module, nn.Module]
Combine = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Formula:
    """How a branch's output changes a stream.

    Attributes:
        combine: Returns the new stream from the old one, the branch's output, and `split_dim`.
        uncombine: Undoes that.
        factor: How many times wider than a stream a branch's output is.
    """

    combine: Combine
    uncombine: Combine
    factor: int = 1


def _added(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return a + t


def _subtracted(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return a - t


def _exp(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return a * torch.exp(t) + t


def _exp_undone(a: Tensor, t: Tensor, _dim: int) -> Tensor:
    return (a - t) / torch.exp(t)


def _scale_shift(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even = torch.arange(0, t.shape[dim], 2, device=t.device)
    shift, log_odds = t.index_select(dim, even), t.index_select(dim, even + 1)
    return 1 / (1 + torch.exp(-log_odds - 2)), shift


def _sigmoid(a: Tensor, t: Tensor, dim: int) -> Tensor:
    scale, shift = _scale_shift(t, dim)
    return a * scale + shift


def _sigmoid_undone(a: Tensor, t: Tensor, dim: int) -> Tensor:
    scale, shift = _scale_shift(t, dim)
    return (a - shift) / scale


def _bounded_scale_shift(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    half = t.shape[dim] // 2
    log_scale, shift = t.narrow(dim, 0, half), t.narrow(dim, half, half)
    return torch.exp(4 / torch.pi * torch.atan(log_scale / 2)), shift


def _bounded(a: Tensor, t: Tensor, dim: int) -> Tensor:
    scale, shift = _bounded_scale_shift(t, dim)
    return a * scale + shift


def _bounded_undone(a: Tensor, t: Tensor, dim: int) -> Tensor:
    scale, shift = _bounded_scale_shift(t, dim)
    return (a - shift) / scale


ADDITIVE = Formula(_added, _subtracted)
AFFINE_EXP = Formula(_exp, _exp_undone)
AFFINE_BOUNDED = Formula(_bounded, _bounded_undone, factor=2)
AFFINE_SIGMOID = Formula(_sigmoid, _sigmoid_undone, factor=2)


class PlainBlock(nn.Module):
    """Two half-steps, with all activations stored by autograd."""

    def __init__(self, f: nn.Module, g: nn.Module, formula: Formula, split_dim: int) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.formula, self.split_dim = formula, split_dim

    def forward(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x1 = self.formula.combine(x1, self.f(x2, **kwargs), self.split_dim)
        x2 = self.formula.combine(x2, self.g(x1, **kwargs), self.split_dim)
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes the half-steps, last one first."""
        y2 = self.formula.uncombine(y2, self.g(y1), self.split_dim)
        y1 = self.formula.uncombine(y1, self.f(y2), self.split_dim)
        return y1, y2


class PlainChain(nn.Module):
    """Blocks between a split and a join."""

    def __init__(self, pairs: list[Pair], formula: Formula, split_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(f, g, formula, split_dim) for f, g in pairs)
        self.split_dim = split_dim

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        # Copies, so that a branch may change its input in place: then it changes the stream.
        x1, x2 = (half.clone() for half in x.chunk(2, self.split_dim))
        for block in self.blocks:
            x1, x2 = self.run(block, x1, x2, **kwargs)
        return torch.cat((x1, x2), self.split_dim)

    def run(self, block: nn.Module, *streams: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Runs a block; to be overridden by those that run it in another way."""
        result: tuple[Tensor, Tensor] = block(*streams, **kwargs)
        return result

    def inverse(self, y: Tensor) -> Tensor:
        """Maps the output back to the input."""
        y1, y2 = y.chunk(2, self.split_dim)
        for block in reversed(list(self.blocks)):
            y1, y2 = block.inverse(y1, y2)  # type: ignore[operator]
        return torch.cat((y1, y2), self.split_dim)
