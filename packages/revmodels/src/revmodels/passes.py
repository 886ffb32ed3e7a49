"""The passes of batch normalization over a batch: how it is cut, and which kernels run on it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from revmodels import kernels
from revmodels.agreement import agree, example

# A tile of the passes over the batch, rows by columns, and the warps that share it. With more rows
# a multiprocessor has registers for one program of `gradient_sums` only.
ROWS = 16
COLUMNS = 128
WARPS = 8
# Programs of the first stage of a sum: enough to occupy a GPU, few enough to be added up by one.
PROGRAMS = 256
# A tile of the second stage, and the threads that share it.
PARTS = 256
CHANNELS = 16
MERGE_WARPS = 8


class _Layout(NamedTuple):
    """How a batch is cut.

    Attributes:
        width: Columns: several rows of channels side by side.
        tiles: The grid of the passes that need every tile once.
        steps: Tiles that a program of the first stage of a sum goes through.
        parts: The grid of that stage.
        fold: Columns of a tile's sums: a power of two of channels has its columns added up.
        rows: Rows of the table of `C` columns that the second stage adds up.
    """

    width: int
    tiles: tuple[int, int]
    steps: int
    parts: tuple[int, int]
    fold: int
    rows: int


@functools.cache
def _lay_out(size: int, channels: int) -> _Layout:
    groups = max(1, COLUMNS // channels)
    width = groups * channels
    across = triton.cdiv(width, COLUMNS)
    down = triton.cdiv(triton.cdiv(size, width), ROWS)
    steps = triton.cdiv(down * across, PROGRAMS)
    parts = triton.cdiv(down, steps)
    fold = COLUMNS // groups if width == COLUMNS and COLUMNS % channels == 0 else COLUMNS
    rows = parts if fold < COLUMNS else parts * groups
    return _Layout(width, (down, across), steps, (parts, across), fold, rows)


def statistics(
    x: Tensor,
    eps: float,
    running: tuple[Tensor, Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes mean and `1 / sqrt(variance + eps)` of every channel.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        eps: Added to the biased variance.
        running: Mean, variance and counter, updated in place.
        momentum: Share of this batch in them.

    Returns:
        Two float32 tensors of shape `(C,)`.
    """
    size, channels = x.numel(), x.shape[1]
    width, _, steps, parts, fold, rows = _lay_out(size, channels)
    partial = torch.empty(2 * rows * channels, dtype=torch.float32, device=x.device)
    result = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    kernels.moments[parts](
        *(x, partial, size, width, channels, steps, ROWS, COLUMNS, fold), num_warps=WARPS
    )
    tracked = running or (result, result, result)
    mean, inverse = result.unbind()
    kernels.merge_moments[(triton.cdiv(channels, CHANNELS),)](
        *(x, partial, mean, inverse, *tracked, size // channels, rows, channels, momentum, eps),
        *(running is not None, PARTS, CHANNELS),
        num_warps=MERGE_WARPS,
    )
    return mean, inverse


def normalize(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: tuple[Tensor, Tensor],
    *,
    relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Computes `weight * (x - mean) * inverse + bias`, and its ReLU, in one pass.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        mean: What `statistics` returned first.
        inverse: What it returned second.
        affine: Scale (the weight) and shift (the bias), float32, shape `(C,)`.
        relu: Whether negative results become zero.
        dtype: Of the result.
    """
    size, channels, y = x.numel(), x.shape[1], torch.empty_like(x, dtype=dtype)
    layout = _lay_out(size, channels)
    kernels.normalize[layout.tiles](
        *(x, mean, inverse, *affine, y, size, layout.width, channels, relu, ROWS, COLUMNS),
        num_warps=WARPS,
    )
    return y


def gradients(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: tuple[Tensor, Tensor],
    *,
    relu: bool,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Computes the gradients of the input, weight and bias, through the statistics.

    Args:
        grad: Gradient of what `normalize` returned, contiguous in `channels_last`.
        x: Like the three that follow, as `normalize` got it.
        mean: Mean of every channel.
        inverse: One over its standard deviation.
        affine: Scale and shift.
        relu: Whether a ReLU followed; its mask is computed again.
        needs_x: Whether the gradient of the input is wanted.
    """
    size, channels = x.numel(), x.shape[1]
    width, tiles, steps, parts, fold, rows = _lay_out(size, channels)
    partial = torch.empty(2 * rows * channels, dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = map(torch.empty_like, affine)
    common = (grad, x, mean, inverse, *affine)
    sizes = (size, width, channels)
    kernels.gradient_sums[parts](
        *(*common, partial, *sizes, steps, relu, ROWS, COLUMNS, fold), num_warps=WARPS
    )
    kernels.merge_sums[(triton.cdiv(channels, CHANNELS),)](
        *(partial, grad_bias, grad_weight, rows, channels, PARTS, CHANNELS),
        num_warps=MERGE_WARPS,
    )
    if not needs_x:
        return None, grad_weight, grad_bias
    out = torch.empty_like(x)
    kernels.input_gradient[tiles](
        *(*common, grad_bias, grad_weight, out, *sizes, channels / size, relu, ROWS, COLUMNS),
        num_warps=WARPS,
    )
    return out, grad_weight, grad_bias


def check(device: str) -> bool:
    """Tells whether the kernels compute on this device what torch does, for one batch."""
    x, grad, (weight, bias) = example(device)
    y = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True).relu()
    wanted = (y, *torch.autograd.grad(y, (x, weight, bias), grad.double()))
    mean, inverse = statistics(x, 1e-5)
    affine = (weight, bias)
    y = normalize(x, mean, inverse, affine, relu=True, dtype=torch.float32)
    found = gradients(grad, x, mean, inverse, affine, relu=True, needs_x=True)
    return agree((y, *found), wanted, 1e-4)  # type: ignore[arg-type]  # with needs_x none is None
