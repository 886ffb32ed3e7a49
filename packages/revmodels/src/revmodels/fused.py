"""Whether operations run as one: who asked for it, where there are kernels, and whether they work.

Kernels of Triton read and write a batch less often than torch's operations one by one. Launched
from Python they take longer, though, so they are for steps that are captured in a CUDA graph, and
`set_fused` asks for them. They are compared with torch once, where they run first.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from revmodels.launch import is_compiling_ahead, is_fake, side_by_side

# Those of this package that have kernels.
MODULES = ("passes", "conv_passes")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def set_fused(module: nn.Module, fused: bool) -> nn.Module:
    """Lets the nets of this package run batch normalization, ReLU and 1x1 convolution as one.

    One operation needs less time on a GPU, but more launches from Python: it pays where the step
    is captured in a CUDA graph. It applies to nets on a CUDA device, in `channels_last`, in
    training and in evaluation without gradients, if Triton is there; elsewhere this changes
    nothing. The results are the same up to rounding. A new net has separate operations. Set this
    before a forward pass, not between it and its backward pass; it is no part of the state dict.

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


def is_fused(norm: nn.Module) -> bool:
    """Tells whether `set_fused` has asked for kernels."""
    fused: bool = norm.__dict__.get("fused", False)
    return fused


def may_fuse(norm: nn.Module, x: Tensor) -> bool:
    """Tells whether kernels are wanted and can do what `norm` would do to `x`."""
    if not is_fused(norm) or torch.compiler.is_compiling():
        return False
    if not x.is_cuda and not interpreted():
        return False
    return not (
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
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or not is_plain(x)
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
    )


def is_plain(x: Tensor) -> bool:
    """Tells whether a tensor is of no subclass, or stands for one that is not."""
    return type(x) is Tensor or is_fake(x)


_loaded: dict[tuple[str, str], ModuleType | None] = {}


def load(name: str, device: str) -> ModuleType | None:
    """Returns a module with kernels, if they work on this kind of device.

    Args:
        name: Of the module in this package; its `check(device)` tells whether the kernels compute
            what torch does, for one batch.
        device: Kind of device.

    Raises:
        RuntimeError: If this is the first call, amid the capture of a CUDA graph.
    """
    if (name, device) in _loaded:
        return _loaded[name, device]
    if is_compiling_ahead():  # without data there is nothing to compare
        return _find(name)
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernels of revmodels.{name} are compiled when they run first, which must not be "
            "while a CUDA graph is being captured: run a step before"
        )
    found = _find(name)
    if found is not None:
        if device == "cuda":
            with suppress(Exception), side_by_side():
                _check(found, device)
        try:
            error = None if _check(found, device) else "they give other results"
        except Exception as raised:  # noqa: BLE001 - a compiler, or a driver, or a GPU that is too old
            error = f"they do not compile: {raised}"
        if error is not None:
            warnings.warn(
                f"networks run without the kernels of revmodels.{name} here, because {error}",
                stacklevel=2,
            )
            found = None
    _loaded[name, device] = found
    return found


def compile_checks(device: str) -> None:
    """Compiles ahead what `load` will launch to compare kernels with torch, if it has not yet."""
    for name in MODULES:
        if (name, device) not in _loaded:
            with suppress(Exception):  # `load` will say what is wrong
                _check(importlib.import_module(f"revmodels.{name}"), device)


def _find(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"revmodels.{name}")
    except ImportError:  # Triton may be missing
        return None


def _check(found: ModuleType, device: str) -> bool:
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        agrees: bool = found.check(device)
        return agrees


@functools.cache
def interpreted() -> bool:
    """Tells whether Triton's interpreter runs the kernels on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
