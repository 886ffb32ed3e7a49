"""Batch normalization and ReLU as one operation, where there are kernels for it.

`nn.BatchNorm2d` and a ReLU read and write a batch four times in the forward pass and six times in
the backward pass; a step of a RevNet spends a third of its time there. On a GPU and in
`channels_last`, the kernels of `revmodels.passes` need three and five passes (one in evaluation),
give the convolution that follows its input in the precision that autocast wants, and do not compute
the statistics again when a reversible chain repeats a branch. Where they do not apply the two
operations run as they are; see `revmodels.fused`. The module stays an `nn.BatchNorm2d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import remember
from revmodels.fused import load, may_fuse
from revmodels.moments import take


def batch_norm_relu(norm: nn.Module, x: Tensor, *, relu: bool = True, cast: bool = True) -> Tensor:
    """Computes `relu(norm(x))`.

    Args:
        norm: An `nn.BatchNorm2d`, or what stands for it, which is called as it is.
        x: Shape `(N, C, H, W)`.
        relu: Whether there is a ReLU.
        cast: Whether a float32 result may have autocast's dtype, as for a convolution that follows
            and would cast it.

    Returns:
        Shape `(N, C, H, W)`.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> batch_norm_relu(norm, torch.randn(2, 3, 4, 4)).min() >= 0
        tensor(True)
    """
    passes = load("passes", x.device.type) if may_fuse(norm, x) else None
    if passes is None:
        plain: Tensor = norm(x)
        # BatchNorm does not keep its output, so ReLU may overwrite it.
        return F.relu(plain, inplace=True) if relu else plain
    kind, dtype = x.device.type, x.dtype
    if cast and dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    constants = (passes, norm.eps, relu, dtype)
    y: Tensor = _Normalize.apply(x, *statistics(norm, x), norm.weight, norm.bias, constants)
    return y


def statistics(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and one over the standard deviation of each channel, by which `norm` normalizes.

    In training they are those of the batch, and the running ones are updated.

    Args:
        norm: An `nn.BatchNorm2d` for which `may_fuse` is true.
        x: The batch.
    """
    moments = take(x)
    if not norm.training:
        return norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)
    passes: Any = load("passes", x.device.type)
    running = None
    if norm.track_running_stats:
        running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    mean, inverse = remember(
        lambda: passes.statistics(x, norm.eps, running, norm.momentum, moments)
    )
    return mean, inverse


class _Normalize(torch.autograd.Function):
    """Normalizes by given statistics; the gradient goes through them, for they are those of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, constants = arguments
        passes, _, relu, dtype = ctx.constants = constants
        ctx.save_for_backward(*tensors)
        x, *by = tensors
        y: Tensor = passes.normalize(x, by, relu=relu, dtype=dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        passes, eps, relu, dtype = ctx.constants
        x, *by = ctx.saved_tensors
        weight, bias = by[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient is differentiated, too
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
            y = (F.relu(y) if relu else y).to(dtype)
            found = plain_gradients(y, (x, weight, bias), grad)
        else:
            grad = grad.contiguous(memory_format=torch.channels_last)
            found = passes.gradients(grad, x, by, relu=relu, needs_x=ctx.needs_input_grad[0])
        of_x, *of_affine = found
        return (of_x, None, None, *of_affine, None)


def plain_gradients(
    y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiates `y`, so that the gradients can be differentiated, too."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple([next(found) if x.requires_grad else None for x in inputs])
