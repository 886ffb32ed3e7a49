"""Batch normalization and ReLU as one operation, where there are kernels for it.

`nn.BatchNorm2d` and a ReLU read and write a batch four times in the forward pass and six times in
the backward pass; a step of a RevNet spends a third of its time there. On a GPU and in `channels_last`, the kernels of
`revmodels.passes` need three and five passes (one in evaluation), give the convolution that follows
its input in the precision that autocast wants, and do not compute the statistics again when a
reversible chain repeats a branch. Launched from Python they take longer than torch's own,
though, so they are for steps that are captured in a CUDA graph, and `set_fused` asks for them.
Everywhere else the two operations run as they are. The module stays an `nn.BatchNorm2d`.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from revcore import remember

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    passes = _passes_for(norm, x)
    if passes is None:
        plain: Tensor = norm(x)
        # BatchNorm does not keep its output, so ReLU may overwrite it.
        return F.relu(plain, inplace=True) if relu else plain
    if norm.training:
        mean, inverse = remember(lambda: _statistics(passes, norm, x))
    else:
        mean, inverse = norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)
    kind, dtype = x.device.type, x.dtype
    if cast and dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    constants = (passes, norm.eps, relu, dtype)
    y: Tensor = _Normalize.apply(x, norm.weight, norm.bias, mean, inverse, constants)
    return y


def set_fused(module: nn.Module, fused: bool) -> nn.Module:
    """Lets the nets of this package run batch normalization and ReLU as one operation, or as two.

    One operation needs less time on a GPU, but six launches from Python where two need five
    cheaper ones: it pays where the step is captured in a CUDA graph. It applies to nets on a CUDA
    device, in `channels_last`, in training and in evaluation without gradients, if Triton is there;
    elsewhere this changes nothing.
    The results are the same up to rounding. A new net has them as two operations. Set this before a
    forward pass, not between it and its backward pass; it is no part of the state dict.

    Args:
        module: The net, or any module with parts of it.
        fused: Whether to run one operation.

    Returns:
        The module.

    Example:
        >>> import revmodels
        >>> net = revmodels.create_model("revnet38")
        >>> set_fused(net, True) is net
        True
    """
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__dict__["fused"] = fused  # of the instance: copies and pickles have it
    return module


def _statistics(passes: ModuleType, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    running = None
    if norm.track_running_stats:
        running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    result: tuple[Tensor, Tensor] = passes.statistics(x, norm.eps, running, norm.momentum)
    return result


class _Normalize(torch.autograd.Function):
    """Normalizes by given statistics; the gradient goes through them, for they are those of x."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, constants = arguments
        passes, _, relu, dtype = ctx.constants = constants
        ctx.save_for_backward(*tensors)
        x, weight, bias, mean, inverse = tensors
        y: Tensor = passes.normalize(x, mean, inverse, (weight, bias), relu=relu, dtype=dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        passes, eps, relu, dtype = ctx.constants
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is differentiated, too
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
            y = (F.relu(y) if relu else y).to(dtype)
            found = _plain_gradients(y, (x, weight, bias), grad)
        else:
            grad = grad.contiguous(memory_format=torch.channels_last)
            found = passes.gradients(
                *(grad, x, mean, inverse, (weight, bias)),
                relu=relu,
                needs_x=ctx.needs_input_grad[0],
            )
        return (*found, None, None, None)


def _plain_gradients(
    y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple([next(found) if x.requires_grad else None for x in inputs])


def _passes_for(norm: nn.Module, x: Tensor) -> ModuleType | None:
    """Returns the passes if they are wanted and can do what `norm` and a ReLU would do to `x`."""
    if not norm.__dict__.get("fused") or torch.compiler.is_compiling():
        return None
    if not x.is_cuda and not _interpreted():
        return None
    if (
        type(norm) is not nn.BatchNorm2d  # SyncBatchNorm computes something else
        # In evaluation the statistics are constants, which is another gradient.
        or (not norm.training and (torch.is_grad_enabled() or norm.running_mean is None))
        or norm.momentum is None
        or not norm.affine
        or (norm.track_running_stats and norm.running_mean is None)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or _has_any_global_hook()
        or type(x) is not Tensor
        or x.dtype not in _DTYPES
        or norm.weight.dtype != torch.float32
        or norm.weight.device != x.device
        or x.dim() != 4
        or x.shape[1] != norm.num_features
        or x.numel() <= norm.num_features  # nn.BatchNorm2d raises
        or not x.is_contiguous(memory_format=torch.channels_last)
        # Transforms of torch.func and forward-mode derivatives see through operations of torch.
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or (x.is_cuda and x.get_device() != torch.cuda.current_device())
    ):
        return None
    return load_passes(x.device.type)


@functools.cache
def load_passes(device: str) -> ModuleType | None:
    """Returns `revmodels.passes` if its kernels work on this kind of device.

    Raises:
        RuntimeError: If this is the first call, amid the capture of a CUDA graph.
    """
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the kernels of batch normalization are compiled when they run first, which must not "
            "be while a CUDA graph is being captured: run a step before"
        )
    try:
        from revmodels import passes  # noqa: PLC0415 - Triton may be missing
    except ImportError:
        return None
    try:
        error = None if _agree(passes, device) else "they give other results"
    except Exception as raised:  # noqa: BLE001 - a compiler, or a driver, or a GPU that is too old
        error = f"they do not compile: {raised}"
    if error is not None:
        warnings.warn(
            f"batch normalization runs without kernels of its own here, because {error}",
            stacklevel=2,
        )
        return None
    found: ModuleType = passes
    return found


def _agree(passes: ModuleType, device: str) -> bool:
    """Tells whether the kernels compute on this device what torch does, for one batch."""
    # On a GPU several tiles for a program, of which the last is not full; the interpreter is slow.
    # Without random numbers, because the generators are not ours.
    shape = (160 if device == "cuda" else 3, 24, 9, 48)
    with torch.inference_mode(False), torch.enable_grad():
        wave = torch.linspace(-60, 60, 2 * math.prod(shape), device=device).sin().view(2, *shape)
        x, grad = wave.permute(0, 1, 4, 2, 3)
        x = (2 * x + 3).requires_grad_()
        weight = torch.linspace(0.5, 1.5, 48, device=device, requires_grad=True)
        bias = torch.linspace(-1, 1, 48, device=device, requires_grad=True)
        y = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True).relu()
        wanted = (y, *torch.autograd.grad(y, (x, weight, bias), grad.double()))
        mean, inverse = passes.statistics(x, 1e-5)
        affine = (weight, bias)
        y = passes.normalize(x, mean, inverse, affine, relu=True, dtype=torch.float32)
        found = (
            y,
            *passes.gradients(grad, x, mean, inverse, affine, relu=True, needs_x=True),
        )
    return all(
        bool((one - two).norm() <= 1e-4 * two.norm())
        for one, two in zip(found, wanted, strict=True)
    )


@functools.cache
def _interpreted() -> bool:
    # Triton's interpreter runs the kernels on the CPU, slowly, for tests.
    return os.environ.get("TRITON_INTERPRET") == "1"
