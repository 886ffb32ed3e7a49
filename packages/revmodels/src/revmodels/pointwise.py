"""A 1x1 convolution of a normalized batch: how it is cut, and which kernels run on it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from revmodels import pointwise_kernels as kernels
from revmodels.agreement import CHANNELS, agree, example, noise
from revmodels.fused import interpreted

# Rows of a tile: few enough for small images to occupy a GPU.
ROWS = 64
# Columns of a tile, at least and at most; tensor cores take no fewer.
LEAST, MOST = 16, 64
# The gradient of what was normalized needs all outputs of a place in one program.
MOST_OUTPUTS = 256
# Programs of the first stage of a sum, and the numbers that they leave to the second.
PROGRAMS = 264
PARTIAL = 1 << 20
# A tile of the second stage.
PARTS, COLUMNS = 64, 32

_FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Affine = tuple[Tensor, Tensor]


class _Layout(NamedTuple):
    """How a batch is cut.

    Attributes:
        channels: Columns of a tile of the input.
        outputs: Columns of a tile of the output.
        all_outputs: A power of two of columns that holds all outputs.
        some_channels: Columns of a tile of the input beside all outputs.
        steps: Tiles that a program of the first stage of a sum goes through.
        parts: Programs of that stage that share the rows.
        warps: Warps of 32 threads in each of them.
    """

    channels: int
    outputs: int
    all_outputs: int
    some_channels: int
    steps: int
    parts: int
    warps: int


def _columns(size: int, most: int = MOST) -> int:
    power: int = triton.next_power_of_2(size)
    return max(LEAST, min(most, power))


@functools.cache
def _lay_out(rows: int, channels: int, outputs: int) -> _Layout:
    all_outputs = _columns(outputs, MOST_OUTPUTS)
    # A program holds the matrix's gradient: `all_outputs * some_channels` sums.
    some = min(_columns(channels), max(LEAST, 8192 // all_outputs))
    tiles = triton.cdiv(rows, ROWS)
    table = (outputs + 2) * channels
    parts = max(1, min(tiles, PROGRAMS // triton.cdiv(channels, some), PARTIAL // table))
    steps = triton.cdiv(tiles, parts)
    return _Layout(
        _columns(channels),
        _columns(outputs),
        all_outputs,
        some,
        steps,
        triton.cdiv(tiles, steps),
        4 if all_outputs * some <= 2048 else 8,
    )


def _product(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Returns the dtype of factors, and how those of float32 are multiplied: as torch is told to."""
    if dtype != torch.float32:
        # The interpreter has no products of half precision.
        return tl.float32 if interpreted() else _FACTORS[dtype], "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    found = getattr(conv, "fp32_precision", None)  # torch 2.9
    tf32 = torch.backends.cudnn.allow_tf32 if found is None else found == "tf32"
    return tl.float32, "tf32" if tf32 else "ieee"


def row_stride(x: Tensor) -> int | None:
    """Returns how far the places of a batch in `channels_last` lie apart: half of its channels have
    places as far apart as all of them.

    Args:
        x: Shape `(N, C, H, W)`.

    Returns:
        The number of values; None if the batch lies in memory in another way.
    """
    _, _, height, width = x.shape
    apart = x.stride(3)
    same = x.stride() == (height * width * apart, 1, width * apart, apart)
    return apart if same and apart >= x.shape[1] else None


def convolve(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: Affine,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    base: Tensor | None = None,
    sign: int = 1,
) -> Tensor:
    """Computes a 1x1 convolution of the ReLU of `weight * (x - mean) * inverse + bias`.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        mean: Float32, shape `(C,)`.
        inverse: One over the standard deviation, likewise.
        affine: Scale (the weight) and shift (the bias), likewise.
        matrix: The convolution's weight, `(O, C, 1, 1)`, contiguous.
        dtype: In which the factors are multiplied, and of the result if there is no `base`.
        base: Shape `(N, O, H, W)`: what the result is added to. It has a `row_stride`.
        sign: -1 to subtract it.

    Returns:
        Shape `(N, O, H, W)`, in `channels_last`.
    """
    n, channels, *image = x.shape
    outputs, rows = matrix.shape[0], x.numel() // channels
    layout = _lay_out(rows, channels, outputs)
    out = torch.empty(
        (n, outputs, *image),
        dtype=dtype if base is None else base.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    added, apart = (x, 0) if base is None else (base, row_stride(base))
    grid = (triton.cdiv(outputs, layout.outputs), triton.cdiv(rows, ROWS))
    kernels.convolve[grid](
        *(x, mean, inverse, *affine, matrix, added, out, rows, channels, outputs, apart, sign),
        *(base is not None, *_product(dtype), ROWS, layout.channels, layout.outputs),
    )
    return out


def gradients(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: Affine,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    needs_x: bool,
    base: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Computes the gradients of the input, scale, shift and matrix, through the statistics.

    Args:
        grad: Gradient of what `convolve` returned, contiguous in `channels_last`.
        x: Like all that follow, as `convolve` got it.
        mean: Mean of every channel.
        inverse: One over its standard deviation.
        affine: Scale and shift.
        matrix: The convolution's weight.
        dtype: In which the factors are multiplied.
        needs_x: Whether the gradient of the input is wanted.
        base: A tensor like `x`, with a `row_stride`, that is added to the gradient of the input.
    """
    channels, outputs = x.shape[1], matrix.shape[0]
    rows = x.numel() // channels
    layout = _lay_out(rows, channels, outputs)
    common = (grad, x, mean, inverse, *affine, matrix)
    sizes, product = (rows, channels, outputs), _product(dtype)
    partial = x.new_empty((layout.parts, outputs + 2, channels), dtype=torch.float32)
    blocks = triton.cdiv(channels, layout.some_channels)
    kernels.gradient_sums[(blocks, layout.parts)](
        *(*common, partial, *sizes, layout.steps),
        *(*product, ROWS, layout.some_channels, layout.all_outputs),
        num_warps=layout.warps,
    )
    of_matrix = torch.empty_like(matrix)
    grad_weight, grad_bias = map(torch.empty_like, affine)
    kernels.add_up[(triton.cdiv((outputs + 2) * channels, COLUMNS),)](
        *(partial, of_matrix, grad_bias, grad_weight, layout.parts, channels, outputs),
        *(PARTS, COLUMNS),
    )
    if not needs_x:
        return None, grad_weight, grad_bias, of_matrix
    out = torch.empty_like(x)
    added, apart = (x, 0) if base is None else (base, row_stride(base))
    grid = (triton.cdiv(channels, layout.channels), triton.cdiv(rows, ROWS))
    kernels.input_gradient[grid](
        *(*common, grad_bias, grad_weight, added, out, *sizes, apart, channels / x.numel()),
        *(base is not None, *product, ROWS, layout.channels, layout.outputs),
    )
    return out, grad_weight, grad_bias, of_matrix


def check(device: str) -> bool:
    """Tells whether the kernels compute on this device what torch does, for one batch."""
    x, base, (weight, bias) = example(device)
    matrix = noise(CHANNELS**2, device).view(CHANNELS, CHANNELS, 1, 1).requires_grad_()
    normal = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True).relu()
    y = base - F.conv2d(normal, matrix.double())
    # The gradient of the convolution; see revcore.get_destination.
    wanted = (y, *torch.autograd.grad(y, (x, weight, bias, matrix), -base.double()))
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    common = (x, mean, (variance + 1e-5).rsqrt(), (weight, bias), matrix)
    y = convolve(*common, dtype=torch.float32, base=base, sign=-1)
    found = gradients(base, *common, dtype=torch.float32, needs_x=True)
    # As exact as TF32, if torch's convolutions are.
    return agree((y, *found), wanted, 5e-3)  # type: ignore[arg-type]  # with needs_x none is None
