"""A convolution of a normalized batch: how it is cut, and which kernels run on it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from revmodels import conv_kernels as kernels
from revmodels.agreement import CHANNELS, agree, example, noise
from revmodels.fused import interpreted
from revmodels.launch import launch
from revmodels.moments import Moments
from revmodels.passes import Normalization, input_gradient, merge_sums

# Rows of a tile of the gradients of 1x1: few enough for small images to occupy a GPU.
ROWS = 64
# Tiles by channels, or by outputs where 1x1 makes them fewer, in float32 and in half precision:
# rows, warps, how many tiles the compiler has on their way at once, and programs of the first stage
# of a sum. By measurement, benchmarks/tiles.py; see benchmarks/LOG.md. The forward pass of 1x1 has
# two tables: for fewer outputs than channels, and for the others.
NARROW = {
    16: ((128, 2, 3), (128, 4, 3)),
    32: ((128, 4, 3), (128, 2, 3)),
    64: ((64, 4, 3), (32, 2, 3)),
}
WIDEN = {
    16: ((128, 4, 2), (64, 2, 3)),
    32: ((128, 2, 2), (128, 2, 2)),
    64: ((128, 4, 2), (128, 4, 2)),
}
# Those of 3x3: the forward pass, and the two gradients.
CONVOLVE = {
    16: ((128, 4, 1), (128, 4, 1)),
    32: ((128, 4, 3), (128, 8, 1)),
    64: ((64, 4, 3), (64, 8, 3)),
}
ACTIVATION = {
    16: ((128, 8, 3, 264), (128, 2, 3, 528)),
    32: ((32, 2, 3, 528), (128, 4, 3, 264)),
    64: ((32, 4, 3, 264), (64, 8, 3, 528)),
}
MATRIX = {
    16: ((32, 1, 3, 1056), (128, 2, 2, 1056)),
    32: ((32, 1, 1, 1056), (64, 4, 3, 528)),
    64: ((32, 4, 1, 1056), (64, 4, 3, 528)),
}
# Columns of a tile, at least and at most; tensor cores take no fewer.
LEAST, MOST = 16, 64
# Outputs of a 1x1 convolution: its gradients need all of a place in one program.
MOST_OUTPUTS = 256
# Channels and outputs of one of 3x3, and in half precision products for each of its nine places
# if it has more than `LEAST` of both: with more, torch's kernels are better.
MOST_AROUND = 64
MOST_PRODUCTS = 40_000_000
# Programs of the first stage of a sum, and the numbers that they leave to the second.
PROGRAMS = 264
PARTIAL = 1 << 20
# A tile of the second stage.
PARTS, COLUMNS = 64, 32

_FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor]


def _columns(size: int, most: int = MOST) -> int:
    power: int = triton.next_power_of_2(size)
    return max(LEAST, min(most, power))


def _product(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Returns the dtype of factors, and how float32 is multiplied: as torch is told to."""
    if dtype != torch.float32:
        # The interpreter has no products of half precision.
        return tl.float32 if interpreted() else _FACTORS[dtype], "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    found = getattr(conv, "fp32_precision", None)  # torch 2.9
    tf32 = torch.backends.cudnn.allow_tf32 if found is None else found == "tf32"
    return tl.float32, "tf32" if tf32 else "ieee"


def row_stride(x: Tensor) -> int | None:
    """Returns how far the places of a batch in `channels_last` lie apart.

    Those of a half of its channels lie as far apart as those of all.

    Args:
        x: Shape `(N, C, H, W)`.

    Returns:
        The number of values; None if the batch lies in memory in another way.
    """
    _, _, height, width = x.shape
    apart = x.stride(3)
    same = x.stride() == (height * width * apart, 1, width * apart, apart)
    return apart if same and apart >= x.shape[1] else None


def can_convolve(x: Tensor, outputs: int, kernel_size: int, dtype: torch.dtype) -> bool:
    """Tells whether there are kernels for a convolution of stride 1 that keeps the image's size.

    Args:
        x: Shape `(N, C, H, W)`.
        outputs: Channels of the result.
        kernel_size: Of the convolution.
        dtype: In which the factors are multiplied.
    """
    channels = x.shape[1]
    if channels % 8 or outputs % 8:
        return False
    if kernel_size == 1:
        return outputs <= MOST_OUTPUTS
    products = x.numel() * outputs
    return (
        kernel_size == 3
        and max(channels, outputs) <= MOST_AROUND
        and (dtype == torch.float32 or max(channels, outputs) <= LEAST or products <= MOST_PRODUCTS)
    )


def can_add(base: Tensor, x: Tensor, kernel_size: int) -> bool:
    """Tells whether `gradients` can add the gradient of `x` to `base`."""
    apart = row_stride(base)
    return base.dtype == x.dtype and (
        apart == x.shape[1] or (apart is not None and kernel_size == 1)
    )


def convolve(
    x: Tensor,
    by: Normalization,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    base: Tensor | None = None,
    sign: int = 1,
    grid: int | None = None,
    peak: Tensor | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """Computes a convolution of the ReLU of what is normalized.

    Args:
        x: Shape `(N, C, H, W)`, contiguous in `channels_last`.
        by: By what it is normalized.
        matrix: The convolution's weight, `(O, C, 1, 1)` or `(O, C, 3, 3)`, in `channels_last`.
        dtype: In which the factors are multiplied, and of the result if there is no `base`.
        base: Shape `(N, O, H, W)`: what the result is added to. It has a `row_stride`.
        sign: -1 to subtract it.
        grid: Number of fractional bits of `base`, which the result is rounded to before it is
            added; see `revcore.FixedPointCoupling`.
        peak: A float32 number that becomes infinite if a sum does not fit into a grid.
        moments: Gets the sums of the result.

    Returns:
        Shape `(N, O, H, W)`, in `channels_last`.
    """
    n, channels, height, width = x.shape
    outputs, rows = matrix.shape[0], n * height * width
    out = torch.empty(
        (n, outputs, height, width),
        dtype=dtype if base is None else base.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    added, apart = (x, 0) if base is None else (base, row_stride(base))
    columns, bits = _columns(outputs), 0 if grid is None else grid
    # The kernel is the same whether somebody asks for the peak or not, and so are the bits.
    peak = torch.empty((), dtype=torch.float32, device=x.device) if peak is None else peak
    kernel_size, image = matrix.shape[-1], (1, 1)
    if kernel_size > 1:
        image, tiles = (height, width), CONVOLVE[_columns(channels)]
    elif outputs < channels:
        tiles = NARROW[_columns(outputs)]
    else:
        tiles = WIDEN[_columns(channels)]
    high, warps, stages = tiles[dtype != torch.float32]
    parts, partial = triton.cdiv(rows, high), out
    if moments is not None:
        partial = torch.empty((2, parts, outputs), dtype=torch.float32, device=x.device)
        moments.sums, moments.places = partial, high
    launch(
        kernels.convolve,
        (triton.cdiv(outputs, columns), parts),
        *(x, *by, matrix, added, out, peak, partial),
        *(rows, channels // 8, outputs // 8, apart, float(sign)),
        *(2.0**bits, 2.0**-bits, 2.0 ** (24 - bits)),
        *(kernel_size, *image, base is not None, grid is not None, moments is not None),
        *(*_product(dtype), high, _columns(channels), columns),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def gradients(
    grad: Tensor,
    x: Tensor,
    by: Normalization,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    needs_x: bool,
    base: Tensor | None = None,
) -> Gradients:
    """Computes the gradients of the input, scale, shift and matrix, through the statistics.

    Args:
        grad: Gradient of what `convolve` returned, contiguous in `channels_last`.
        x: As `convolve` got it.
        by: Likewise.
        matrix: Likewise.
        dtype: In which the factors are multiplied.
        needs_x: Whether the gradient of the input is wanted.
        base: A tensor for which `can_add` is true: the gradient of the input is added to it.
    """
    function = _gradients if matrix.shape[-1] == 1 else _gradients_around
    return function(grad, x, by, matrix, dtype=dtype, needs_x=needs_x, base=base)


def _gradients(
    grad: Tensor,
    x: Tensor,
    by: Normalization,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    needs_x: bool,
    base: Tensor | None,
) -> Gradients:
    """Those of 1x1. The gradient of what was normalized is not in memory: two passes compute it."""
    outputs, channels = matrix.shape[:2]
    rows, product = x.numel() // channels, _product(dtype)
    all_outputs = _columns(outputs, MOST_OUTPUTS)
    # A program holds the matrix's gradient: `all_outputs * some` sums.
    some = min(_columns(channels), max(LEAST, 8192 // all_outputs))
    blocks, table = triton.cdiv(channels, some), (outputs + 2) * channels
    # It also holds two sums for each value of a tile.
    high = ROWS if some < MOST else ROWS // 2
    steps, parts = _parts(rows, high, PROGRAMS // blocks, table)
    partial = x.new_empty((parts, table), dtype=torch.float32)
    launch(
        kernels.gradient_sums,
        (blocks, parts),
        *(grad, x, *by, matrix, partial, rows, channels // 8, outputs // 8, steps),
        *(*product, high, some, all_outputs),
        num_warps=8 if some == MOST or all_outputs * some > 2048 else 4,
    )
    of_matrix = torch.empty_like(matrix)
    grad_weight, grad_bias = partial.new_empty((2, channels)).unbind()
    launch(
        kernels.add_up,
        (triton.cdiv(table, COLUMNS),),
        *(partial, of_matrix, grad_bias, grad_weight, parts, outputs * channels, channels),
        *(True, PARTS, COLUMNS),
    )
    if not needs_x:
        return None, grad_weight, grad_bias, of_matrix
    out = torch.empty_like(x)
    added, apart = (x, 0) if base is None else (base, row_stride(base))
    columns = _columns(channels)
    launch(
        kernels.input_gradient,
        (triton.cdiv(channels, columns), triton.cdiv(rows, ROWS)),
        *(grad, x, *by, matrix, grad_bias, grad_weight, added, out),
        *(rows, channels // 8, outputs // 8, apart, 1 / rows),
        *(base is not None, *product, ROWS, columns, _columns(outputs)),
        enable_fp_fusion=False,  # the same bits as if `base` were added outside
    )
    return out, grad_weight, grad_bias, of_matrix


def _gradients_around(
    grad: Tensor,
    x: Tensor,
    by: Normalization,
    matrix: Tensor,
    *,
    dtype: torch.dtype,
    needs_x: bool,
    base: Tensor | None,
) -> Gradients:
    """Those of 3x3. Nine products give the gradient of what was normalized, which is written."""
    n, channels, height, width = x.shape
    outputs, kernel_size = matrix.shape[0], matrix.shape[-1]
    rows, tiles = n * height * width, (_columns(channels), _columns(outputs))
    sizes, constants = (rows, channels // 8, outputs // 8), (kernel_size, height, width)
    half = dtype != torch.float32
    high, warps, stages, programs = ACTIVATION[tiles[0]][half]
    steps, parts = _parts(rows, high, programs, 2 * channels)
    of_normal = torch.empty_like(x, dtype=dtype)
    partial = x.new_empty((2, parts, channels), dtype=torch.float32)
    launch(
        kernels.activation_gradient,
        (parts,),
        *(grad, x, *by, matrix, of_normal, partial, *sizes, steps),
        *(*constants, *_product(dtype), high, *tiles),
        num_warps=warps,
        num_stages=stages,
    )
    of_affine = merge_sums(partial, parts, channels)

    taps = kernel_size**2
    high, warps, stages, programs = MATRIX[tiles[0]][half]
    steps, parts = _parts(rows, high, programs // taps, matrix.numel())
    partial = x.new_empty((parts, matrix.numel()), dtype=torch.float32)
    launch(
        kernels.matrix_gradient,
        (taps, parts),
        *(grad, x, *by, partial, *sizes, steps),
        *(*constants, *_product(dtype), high, *tiles),
        num_warps=warps,
        num_stages=stages,
    )
    of_matrix = torch.empty_like(matrix)
    launch(
        kernels.add_up,
        (triton.cdiv(matrix.numel(), COLUMNS),),
        *(partial, of_matrix, partial, partial, parts, matrix.numel(), channels),
        *(False, PARTS, COLUMNS),
    )
    if not needs_x:
        return None, *of_affine, of_matrix
    out = input_gradient(of_normal, x, by, of_affine, relu=False, base=base)
    return out, *of_affine, of_matrix


def _parts(rows: int, high: int, programs: int, table: int) -> tuple[int, int]:
    """Cuts the rows for the first stage of a sum: tiles of a part, and parts."""
    tiles = triton.cdiv(rows, high)
    steps = triton.cdiv(tiles, max(1, min(tiles, programs, PARTIAL // table)))
    return steps, triton.cdiv(tiles, steps)


def check(device: str) -> bool:
    """Tells whether the kernels compute on this device what torch does, for one batch."""
    return _check(device, 1) and _check(device, 3)


def _check(device: str, kernel_size: int) -> bool:
    x, base, (weight, bias) = example(device)
    shape = (CHANNELS, kernel_size, kernel_size, CHANNELS)
    matrix = noise(math.prod(shape), device).view(shape).permute(0, 3, 1, 2).requires_grad_()
    normal = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True).relu()
    y = base - F.conv2d(normal, matrix.double(), padding=kernel_size // 2)
    # The gradient of the convolution; see revcore.get_destination. Added to another one.
    wanted = torch.autograd.grad(y, (x, weight, bias, matrix), -base.double())
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    by = Normalization(mean, (variance + 1e-5).rsqrt(), weight, bias)
    found = gradients(base, x, by, matrix, dtype=torch.float32, needs_x=True, base=base)
    result = convolve(x, by, matrix, dtype=torch.float32, base=base, sign=-1)
    wanted = (y, wanted[0] + base, *wanted[1:])
    # As exact as TF32, if torch's convolutions are.
    return agree((result, *found), wanted, 5e-3)  # type: ignore[arg-type]  # none is None
