"""One tensor as two streams, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revcore.tracing import is_traced

Streams = tuple[Tensor, ...]

_innermost_transform = torch._C._functorch.peek_interpreter_stack


def as_dim(split_dim: int) -> int:
    """Returns `split_dim`.

    Raises:
        TypeError: If it is no integer.
    """
    try:
        return operator.index(split_dim)
    except TypeError:
        raise TypeError(f"split_dim (={split_dim!r}) must be an integer") from None


def split(x: Sequence[Tensor], split_dim: int, count: int = 2) -> Streams:
    """Splits a single tensor in equal streams; streams that come apart stay apart.

    Raises:
        TypeError: If there is nothing to split, or something that is not a tensor.
        ValueError: If the tensor has no dimension `split_dim`, or a size along it that `count` does
            not divide.
    """
    if not x:
        raise TypeError("expected one tensor or several streams, got no argument")
    if not all(isinstance(tensor, Tensor) for tensor in x):
        kinds = ", ".join(type(tensor).__name__ for tensor in x)
        raise TypeError(
            f"the arguments must be tensors, got {kinds}; pass what the branches take beside their "
            "stream by keyword"
        )
    if len(x) > 1:
        return tuple(x)
    tensor = x[0]
    if count == 1:
        return (tensor,)
    if not -tensor.dim() <= split_dim < tensor.dim():
        raise ValueError(
            f"cannot split along split_dim={split_dim}: the input has shape {tuple(tensor.shape)}"
        )
    size = tensor.shape[split_dim]
    if size % count:
        raise ValueError(
            f"cannot split split_dim={split_dim} of size {size} in {count} equal streams: the "
            f"input has shape {tuple(tensor.shape)}. Give it a size that {count} divides, or pass "
            f"{count} streams."
        )
    return tuple(tensor.split(size // count, split_dim)) if size else (tensor,) * count


def join(x: Sequence[Tensor], streams: Streams, split_dim: int) -> Tensor | Streams:
    """Joins the streams if `x`, the input that they came from, was a single tensor."""
    if len(x) > 1:
        return streams
    # A stream that is alone stays the tensor that it is, which a chain around may wait for.
    return streams[0] if len(streams) == 1 else torch.cat(streams, split_dim)


def dense(x: Tensor) -> Tensor:
    """Returns `x`, copied if it is a view with gaps, in the same order of dimensions.

    The halves of a split tensor have gaps, and kernels may give other bits for other strides. A
    reconstructed stream has none, so the branch must never see any.
    """
    if x.is_contiguous() or in_transform():
        return x
    # Images in channels_last are the usual case, and asking for that takes a quarter of the time.
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    # torch.compile cannot ask.
    if not is_traced() and torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone()


def alone(x: Tensor) -> Tensor:
    """Returns `x`, copied if it is a part of a larger tensor, which it would keep alive."""
    whole = x._base
    return x if whole is None or whole.numel() <= x.numel() else x.clone()


def in_transform() -> bool:
    """Tells whether a transform of torch.func is at work, in which nothing is reversed.

    Under vmap a tensor does not say how it lies in memory.
    """
    return not is_traced() and _innermost_transform() is not None


def as_streams(y: Any) -> Streams:
    """Returns a tuple of what a module returned, a tensor or a tuple of them."""
    return y if isinstance(y, tuple) else (y,)


def with_log_det(y: Tensor | Streams, log_dets: Sequence[Tensor]) -> Streams:
    """Appends the sum of log-determinants, of shape (batch,), to a tensor or streams."""
    streams = as_streams(y)
    return (*streams, sum(log_dets, streams[0].new_zeros(len(streams[0]))))
