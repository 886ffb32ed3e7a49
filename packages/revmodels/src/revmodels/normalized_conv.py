"""Batch normalization, ReLU and a convolution as one operation, where there are kernels for it.

Between a normalization and the convolution that follows it lies a batch that only they read:
written once and read three times, for the convolution, for the gradient of its weight and for the
normalization's own. With the kernels of `revmodels.conv_passes` it never exists: they compute it
again while they read what comes before. The last convolution of a branch also adds its result to
the stream that it is meant for, and the first one its gradient to that of the stream that it reads.
Elsewhere the operations run as they are; see `revmodels.fused`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import Destination
from revmodels.batchnorm import batch_norm_relu, plain_gradients, statistics
from revmodels.fused import is_plain, load, may_fuse
from revmodels.moments import Moments, tell

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_relu_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    *,
    normalized_next: bool = False,
    result_to: Destination | None = None,
    gradient_to: Destination | None = None,
) -> Tensor:
    """Computes `conv(relu(norm(x)))`.

    Args:
        norm: An `nn.BatchNorm2d`, or what stands for it, which is called as it is.
        conv: An `nn.Conv2d`, likewise.
        x: Shape `(N, C, H, W)`.
        normalized_next: Whether the result goes to a normalization.
        result_to: Of a branch that ends here; see `revcore.get_destination`.
        gradient_to: Of a branch whose input is `x` and nothing else.

    Returns:
        Shape `(N, C', H', W')`.

    Example:
        >>> norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1, bias=False)
        >>> norm_relu_conv(norm, conv, torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """
    kernels = load("conv_passes", x.device.type) if may_fuse(norm, x) else None
    dtype = None if kernels is None else _product_dtype(conv, x, kernels)
    if dtype is None:
        plain: Tensor = conv(batch_norm_relu(norm, x))
        return plain
    base = None
    if result_to is not None and _fits(result_to, conv, x, dtype, kernels):
        base, result_to.added = result_to.stream, True
        # A new stream is what another branch will normalize; one that is reconstructed has
        # statistics.
        normalized_next = not result_to.reconstructs
    moments = Moments() if normalized_next and norm.training else None
    constants = (kernels, norm.eps, dtype, result_to, gradient_to)
    y: Tensor = _NormalizedConv.apply(
        *(x, *statistics(norm, x), norm.weight, norm.bias, conv.weight),
        *(base, moments, constants),
    )
    if moments is not None:
        tell(y, moments)
    return y


class _NormalizedConv(torch.autograd.Function):
    """Normalizes by given statistics; the gradient goes through them, for they are those of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, base, moments, constants = arguments
        kernels, _, dtype, to, _ = ctx.constants = constants
        ctx.save_for_backward(*tensors)
        x, *by, matrix = tensors
        kwargs = {}
        if base is not None:
            kwargs = {"base": base, "sign": to.sign, "grid": to.grid, "peak": to.peak}
        ctx.negative = base is not None and to.sign < 0 and not to.reconstructs
        y: Tensor = kernels.convolve(x, by, matrix, dtype=dtype, moments=moments, **kwargs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels, eps, dtype, _, gradient_to = ctx.constants
        of_base = grad if ctx.needs_input_grad[6] else None
        if ctx.negative:
            grad = -grad
        x, *by, matrix = ctx.saved_tensors
        weight, bias = by[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient is differentiated, too
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
            y = F.conv2d(F.relu(y).to(dtype), matrix.to(dtype), padding=matrix.shape[-1] // 2)
            found = plain_gradients(y, (x, weight, bias, matrix), grad.to(dtype))
        else:
            base = None if gradient_to is None else gradient_to.gradient
            needs_x = ctx.needs_input_grad[0]
            if base is not None and needs_x and kernels.can_add(base, x, matrix.shape[-1]):
                gradient_to.gradient_added = True
            else:
                base = None
            found = kernels.gradients(
                grad.contiguous(memory_format=torch.channels_last),
                *(x, by, matrix),
                dtype=dtype,
                needs_x=needs_x,
                base=base,
            )
        of_x, *of_affine, of_matrix = found
        return (of_x, None, None, *of_affine, of_matrix, of_base, None, None)


def _product_dtype(conv: Any, x: Tensor, kernels: Any) -> torch.dtype | None:
    """Returns the dtype of the convolution; None if the kernels cannot do what it does."""
    if (
        type(conv) is not nn.Conv2d  # a parametrized one is of another type
        or conv.kernel_size not in {(1, 1), (3, 3)}
        or conv.padding != (conv.kernel_size[0] // 2,) * 2
        or conv.padding_mode != "zeros"
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.bias is not None
        or conv._forward_hooks
        or conv._forward_pre_hooks
        or conv._backward_hooks
        or conv._backward_pre_hooks
        or conv.in_channels != x.shape[1]
        or conv.weight.device != x.device
        or conv.weight.dtype not in _DTYPES
        or not conv.weight.permute(0, 2, 3, 1).is_contiguous()
    ):
        return None
    kind: str = x.device.type
    dtype: torch.dtype = x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif conv.weight.dtype != x.dtype:
        return None
    able = kernels.can_convolve(x, conv.out_channels, conv.kernel_size[0], dtype)
    return dtype if able else None


def _fits(to: Destination, conv: Any, x: Tensor, dtype: torch.dtype, kernels: Any) -> bool:
    stream = to.stream
    fits: bool = (
        is_plain(stream)
        and stream.shape == (x.shape[0], conv.out_channels, *x.shape[2:])
        and stream.device == x.device
        and stream.dtype in (_DTYPES if to.grid is None else (torch.float32,))
        and stream.dtype == torch.promote_types(stream.dtype, dtype)
        and kernels.row_stride(stream) is not None
    )
    return fits
