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
from revmodels.launch import launch
from revmodels.moments import Moments

# A tile of the passes over the batch, rows by columns, and the warps that share it. With more rows
# a multiprocessor has registers for one program of `gradient_sums` only.
ROWS = 16
COLUMNS = 128
WARPS = 8
# Programs of the first stage of a sum: enough to occupy a GPU, few enough to be added up by one.
PROGRAMS = 256
# A tile of the second stage, and the warps that share it.
PARTS = 256
CHANNELS = 8
MERGE_WARPS = 16


class Normalization(NamedTuple):
    """By what a batch is normalized: `weight * (x - mean) * inverse + bias`, float32, shape `(C,)`.

    Attributes:
        mean: Mean of every channel.
        inverse: One over its standard deviation.
        weight: Scale.
        bias: Shift.
    """

    mean: Tensor
    inverse: Tensor
    weight: Tensor
    bias: Tensor


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
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes mean and `1 / sqrt(variance + eps)` of every channel.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        eps: Added to the biased variance.
        running: Mean, variance and counter, updated in place.
        momentum: Share of this batch in them.
        moments: What is known of the batch.

    Returns:
        Two float32 tensors of shape `(C,)`.
    """
    if moments is None or moments.sums is None:
        partial, parts = _sum_up(x)
        places = 0
    else:
        partial, parts, places = moments.sums, moments.sums.shape[1], moments.places
    channels = x.shape[1]
    result = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    tracked = running or (result, result, result)
    mean, inverse = result.unbind()
    launch(
        kernels.merge_moments,
        (triton.cdiv(channels, CHANNELS),),
        *(x, partial, mean, inverse, *tracked),
        *(x.numel() // channels, places, parts, channels, momentum, eps),
        *(running is not None, places > 0, PARTS, CHANNELS),
        num_warps=MERGE_WARPS,
    )
    return mean, inverse


def _sum_up(x: Tensor) -> tuple[Tensor, int]:
    """Returns tables of deviations from a pivot, and of their squares; and the rows of a table."""
    size, channels = x.numel(), x.shape[1]
    width, _, steps, parts, fold, rows = _lay_out(size, channels)
    partial = torch.empty(2 * rows * channels, dtype=torch.float32, device=x.device)
    launch(
        kernels.moments,
        parts,
        *(x, partial, size, width, channels, steps, ROWS, COLUMNS, fold),
        num_warps=WARPS,
    )
    return partial, rows


def normalize(x: Tensor, by: Normalization, *, relu: bool, dtype: torch.dtype) -> Tensor:
    """Normalizes, and computes the ReLU of the result, in one pass.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        by: By what.
        relu: Whether negative results become zero.
        dtype: Of the result.
    """
    size, channels, y = x.numel(), x.shape[1], torch.empty_like(x, dtype=dtype)
    layout = _lay_out(size, channels)
    launch(
        kernels.normalize,
        layout.tiles,
        *(x, *by, y, size, layout.width, channels, relu, ROWS, COLUMNS),
        num_warps=WARPS,
    )
    return y


def gradients(
    grad: Tensor, x: Tensor, by: Normalization, *, relu: bool, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Computes the gradients of the input, weight and bias, through the statistics.

    Args:
        grad: Gradient of what `normalize` returned, contiguous in `channels_last`.
        x: As `normalize` got it.
        by: Likewise.
        relu: Whether a ReLU followed; its mask is computed again.
        needs_x: Whether the gradient of the input is wanted.
    """
    size, channels = x.numel(), x.shape[1]
    width, _, steps, parts, fold, rows = _lay_out(size, channels)
    partial = torch.empty(2 * rows * channels, dtype=torch.float32, device=x.device)
    launch(
        kernels.gradient_sums,
        parts,
        *(grad, x, *by, partial, size, width, channels, steps, relu),
        *(ROWS, COLUMNS, fold),
        num_warps=WARPS,
    )
    of_affine = merge_sums(partial, rows, channels)
    if not needs_x:
        return None, *of_affine
    return input_gradient(grad, x, by, of_affine, relu=relu), *of_affine


def merge_sums(partial: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Adds up two tables of `rows` rows of channels: the gradients of weight and bias."""
    grad_weight, grad_bias = partial.new_empty((2, channels)).unbind()
    launch(
        kernels.merge_sums,
        (triton.cdiv(channels, CHANNELS),),
        *(partial, grad_bias, grad_weight, rows, channels, PARTS, CHANNELS),
        num_warps=MERGE_WARPS,
    )
    return grad_weight, grad_bias


def input_gradient(
    grad: Tensor,
    x: Tensor,
    by: Normalization,
    of_affine: tuple[Tensor, Tensor],
    *,
    relu: bool,
    base: Tensor | None = None,
) -> Tensor:
    """Computes the gradient of the input from those of weight and bias.

    Args:
        grad: As for `gradients`.
        x: Likewise.
        by: Likewise.
        of_affine: Gradients of weight and bias.
        relu: Whether a ReLU followed.
        base: A tensor like `x` to which the gradient is added.
    """
    size, channels, out = x.numel(), x.shape[1], torch.empty_like(x)
    width, tiles, *_ = _lay_out(size, channels)
    grad_weight, grad_bias = of_affine
    launch(
        kernels.input_gradient,
        tiles,
        *(grad, x, *by, grad_bias, grad_weight, x if base is None else base, out),
        *(size, width, channels, channels / size, relu, base is not None, ROWS, COLUMNS),
        num_warps=WARPS,
        enable_fp_fusion=False,  # the same bits as if `base` were added outside
    )
    return out


def check(device: str) -> bool:
    """Tells whether the kernels compute on this device what torch does, for one batch."""
    x, grad, (weight, bias) = example(device)
    y = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True).relu()
    wanted = (y, *torch.autograd.grad(y, (x, weight, bias), grad.double()))
    by = Normalization(*statistics(x, 1e-5), weight, bias)
    y = normalize(x, by, relu=True, dtype=torch.float32)
    found = gradients(grad, x, by, relu=True, needs_x=True)
    return agree((y, *found), wanted, 1e-4)  # type: ignore[arg-type]  # with needs_x none is None
