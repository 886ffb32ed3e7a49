"""Recomputing what cannot be reversed: a module that keeps its input instead of its activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revcore.arguments import tensors_of
from revcore.engine import Call, can_reverse, run_in
from revcore.invertible import InvertibleStep
from revcore.tape import Tape
from revcore.tracing import is_traced


def recompute(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """Calls a module that runs again in the backward pass, so that only its input is kept.

    For what lies between reversible chains and changes the shape of the streams. What a reversible
    branch is promised holds here, too: the second run sees the same random numbers, autocast,
    training flags and buffers, and buffers change once. Without grad mode, under `torch.compile`
    and under transforms of `torch.func`, this is `module(x)`.

    References:
        Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016), section 4.1.
        https://arxiv.org/abs/1604.06174

    Args:
        module: Maps one tensor to one tensor, of any shape.
        x: Its input, not to be changed in place before the backward pass.
        **kwargs: Extra arguments for the module; tensors among them get their gradients.

    Returns:
        What the module returns.

    Raises:
        TypeError: If `module` is no module, `x` no tensor, or `module` does not return one tensor.
        RuntimeError: If the module changes its input in place; in the backward pass, if the input
            or a parameter has been changed, or for a second derivative.

    Example:
        >>> import torch
        >>> layer = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> recompute(layer, torch.zeros(3, 2)).shape
        torch.Size([3, 4])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an nn.Module, got {type(module).__name__}; make the function or "
            "method the forward of a module"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be one tensor, got {type(x).__name__}; pass others by keyword")
    if is_traced() or not can_reverse():
        plain: Tensor = module(x, **kwargs)
        return plain
    # A chain of one step whose input is kept, so that the step need not be undone.
    tape = Tape()
    tape.drift = None
    # It also stands for what the step gives, which may change or be gone: nothing needs that.
    for index in (0, 1):
        tape.keep(index, (x,))
    call = Call(tape, given=tensors_of(kwargs))
    (y,) = run_in(call, [InvertibleStep(module, 1, 0)], (x,), kwargs)
    return y
