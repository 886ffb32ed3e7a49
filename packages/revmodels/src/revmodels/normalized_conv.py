"""Batch normalization, ReLU and a convolution as one operation, where there are kernels for it.

Between a normalization and the 1x1 convolution that follows it lies a batch that only they read:
written once and read three times, for the convolution, for the gradient of its weight and for the
normalization's own. With the kernels of `revmodels.pointwise` it never exists: their passes compute
it again while they read what comes before. The last convolution of a branch also adds its result to
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
from revmodels.fused import load, may_fuse

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_relu_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    *,
    result_to: Destination | None = None,
    gradient_to: Destination | None = None,
) -> Tensor:
    """Computes `conv(relu(norm(x)))`.

    Args:
        norm: An `nn.BatchNorm2d`, or what stands for it, which is called as it is.
        conv: An `nn.Conv2d`, likewise.
        x: Shape `(N, C, H, W)`.
        result_to: Of a branch that ends here; see `revcore.get_destination`.
        gradient_to: Of a branch whose input is `x` and nothing else.

    Returns:
        Shape `(N, C', H', W')`.

    Example:
        >>> norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1, bias=False)
        >>> norm_relu_conv(norm, conv, torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """
    pointwise = load("pointwise", x.device.type) if may_fuse(norm, x) else None
    dtype = None if pointwise is None else _product_dtype(conv, x, pointwise.MOST_OUTPUTS)
    if dtype is None:
        y: Tensor = conv(batch_norm_relu(norm, x))
        return y
    base, sign = None, 1
    if result_to is not None and _fits(result_to.stream, conv, x, dtype, pointwise):
        base, sign, result_to.added = result_to.stream, result_to.sign, True
    constants = (pointwise, norm.eps, dtype, sign, gradient_to)
    y = _NormalizedConv.apply(
        x, norm.weight, norm.bias, conv.weight, *statistics(norm, x), base, constants
    )
    return y


class _NormalizedConv(torch.autograd.Function):
    """Normalizes by given statistics; the gradient goes through them, for they are those of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, base, constants = arguments
        pointwise, _, dtype, sign, _ = ctx.constants = constants
        ctx.save_for_backward(*tensors)
        x, weight, bias, matrix, mean, inverse = tensors
        y: Tensor = pointwise.convolve(
            x, mean, inverse, (weight, bias), matrix, dtype=dtype, base=base, sign=sign
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # That of the convolution's result, whatever the sign: it is -1 where nobody differentiates
        # the sum; see revcore.get_destination.
        pointwise, eps, dtype, _, gradient_to = ctx.constants
        x, weight, bias, matrix, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is differentiated, too
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
            y = F.conv2d(F.relu(y).to(dtype), matrix.to(dtype))
            found = plain_gradients(y, (x, weight, bias, matrix), grad.to(dtype))
        else:
            base = None if gradient_to is None else gradient_to.gradient
            needs_x = ctx.needs_input_grad[0]
            if base is not None and needs_x and base.dtype == x.dtype and pointwise.row_stride(base):
                gradient_to.gradient_added = True
            else:
                base = None
            found = pointwise.gradients(
                grad.contiguous(memory_format=torch.channels_last),
                *(x, mean, inverse, (weight, bias), matrix),
                dtype=dtype,
                needs_x=needs_x,
                base=base,
            )
        return (*found, None, None, grad if ctx.needs_input_grad[6] else None, None)


def _product_dtype(conv: Any, x: Tensor, most_outputs: int) -> torch.dtype | None:
    """Returns the dtype of the convolution; None if the kernels cannot do what it does."""
    if (
        type(conv) is not nn.Conv2d  # a parametrized one is of another type
        or conv.kernel_size != (1, 1)
        or conv.stride != (1, 1)
        or conv.padding != (0, 0)
        or conv.groups != 1
        or conv.bias is not None
        or conv._forward_hooks
        or conv._forward_pre_hooks
        or conv._backward_hooks
        or conv._backward_pre_hooks
        or conv.in_channels != x.shape[1]
        or conv.out_channels > most_outputs
        or conv.weight.device != x.device
        or conv.weight.dtype not in _DTYPES
        or conv.weight.stride()[:2] != (conv.in_channels, 1)
    ):
        return None
    kind: str = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype if conv.weight.dtype == x.dtype else None


def _fits(stream: Tensor, conv: Any, x: Tensor, dtype: torch.dtype, pointwise: Any) -> bool:
    fits: bool = (
        type(stream) is Tensor
        and stream.shape == (x.shape[0], conv.out_channels, *x.shape[2:])
        and stream.device == x.device
        and stream.dtype == torch.promote_types(stream.dtype, dtype)
        and pointwise.row_stride(stream) is not None
    )
    return fits
