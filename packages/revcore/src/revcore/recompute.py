"""Recomputing what cannot be reversed: a module that keeps its input instead of its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revcore.arguments import tensors_of
from revcore.engine import can_reverse, outside_inference
from revcore.replay import Replay, Seen
from revcore.survey import Group
from revcore.tape import Saved

_SECOND_TIME = (
    "Trying to backward through a recomputed module a second time, after its input has been freed. "
    "Specify retain_graph=True in the first backward pass."
)


class _RecomputeNode(torch.autograd.Function):
    """Runs a module without a graph; the backward pass runs it again with one."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, x: Tensor, *_leaves: Tensor) -> Tensor:
        ctx.replay = replay
        ctx.saved = Saved([x], "the input of a recomputed module")
        return replay.first_run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a recomputed module cannot be differentiated twice (create_graph=True). Call it "
                "without revcore.recompute where you need second derivatives."
            )
        if torch.is_inference_mode_enabled():
            return outside_inference(_RecomputeNode.backward, ctx, grad)
        if ctx.saved is None:
            raise RuntimeError(_SECOND_TIME)
        (x,) = ctx.saved.get()
        _, pull = ctx.replay.record(x)
        found = pull(grad)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.saved = ctx.replay = None
        return (None, *found)


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
    if not torch.compiler.is_compiling() and can_reverse():
        group = Group([module])
        seen = Seen(group, kwargs, tensors_of(kwargs))
        replay = Replay(module, group.surveys[0], seen)
        replay.needs_x = x.requires_grad
        if replay.needs_x or replay.leaves:
            node: Tensor = _RecomputeNode.apply(replay, x, *replay.leaves)
            return node
    y: Tensor = module(x, **kwargs)
    return y
