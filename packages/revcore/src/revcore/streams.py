"""One tensor as two streams, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Streams = tuple[Tensor, ...]


def split(x: Sequence[Tensor], split_dim: int) -> Streams:
    """Splits a single tensor in two equal streams; streams that come apart stay apart.

    Raises:
        TypeError: If there is nothing to split, or something that is not a tensor.
        ValueError: If the tensor has no dimension `split_dim`, or an odd size along it.
    """
    if not x:
        raise TypeError("expected one tensor or several streams, got no argument")
    for position, tensor in enumerate(x):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"argument {position} must be a tensor, got {type(tensor).__name__}; pass what the "
                "branches take beside their stream by keyword"
            )
    if len(x) > 1:
        return tuple(x)
    tensor = x[0]
    if not -tensor.dim() <= split_dim < tensor.dim():
        raise ValueError(
            f"cannot split along split_dim={split_dim}: the input has shape {tuple(tensor.shape)}"
        )
    size = tensor.shape[split_dim]
    if size % 2:
        raise ValueError(
            f"cannot split split_dim={split_dim} of size {size} in two equal streams: the input "
            f"has shape {tuple(tensor.shape)}. Give it an even size, or pass two streams."
        )
    return tuple(tensor.split(size // 2, split_dim)) if size else (tensor, tensor)


def join(x: Sequence[Tensor], streams: Streams, split_dim: int) -> Tensor | Streams:
    """Joins the streams if `x`, the input that they came from, was a single tensor."""
    return torch.cat(streams, split_dim) if len(x) == 1 else streams
