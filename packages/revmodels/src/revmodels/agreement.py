"""A batch on which kernels are compared with torch, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from revmodels.launch import is_fake

CHANNELS = 48


def noise(count: int, device: str) -> Tensor:
    """Creates numbers in -1..1 that look random, without the generators, which are not ours."""
    wild = (torch.arange(count, device=device, dtype=torch.float64) * 12.9898).sin() * 43758.5453
    return (2 * (wild - wild.floor()) - 1).float()


def example(device: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Creates a batch in `channels_last`, another one of its shape, and a scale and a shift."""
    # On a GPU several tiles for a program, of which the last is not full; the interpreter is slow.
    shape = (160 if device == "cuda" else 2, 12, 9, CHANNELS)
    x, other = noise(2 * math.prod(shape), device).view(2, *shape).permute(0, 1, 4, 2, 3)
    weight = torch.linspace(0.5, 1.5, CHANNELS, device=device, requires_grad=True)
    bias = torch.linspace(-1, 1, CHANNELS, device=device, requires_grad=True)
    return (2 * x + 3).requires_grad_(), other, (weight, bias)


def agree(found: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float) -> bool:
    """Tells whether the relative errors are within the tolerance; NaN is not.

    Tensors without data agree: what they are for is what has been launched.
    """
    return all(
        is_fake(one) or bool((one - two).norm() <= tolerance * two.norm())
        for one, two in zip(found, wanted, strict=True)
    )
