"""The graph of one branch: differentiating it, and a look for what must not be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_engine = torch.autograd.Variable._execution_engine
_Leaf = torch._C._functions.AccumulateGrad


def differentiate(
    t: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor, branch: nn.Module
) -> list[Tensor | None]:
    """Returns the gradients of a branch's output, None where none is needed or there is none.

    Args:
        t: Output of a branch, with its graph.
        inputs: The leaves of the graph: what the branch read, and its parameters.
        needed: For each of them, whether its gradient is needed.
        grad: Gradient of `t`.
        branch: The module that computed `t`.

    Raises:
        RuntimeError: If the graph ends in a tensor that is not among the inputs.
    """
    if not t.requires_grad:
        return [None] * len(inputs)
    refuse_foreign_leaves(t, inputs, branch)
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    if grad.dtype != t.dtype:
        grad = grad.to(t.dtype)
    # What torch.autograd.grad does after 20 microseconds of looking at its arguments. The flags:
    # keep the graph, create one, allow inputs that were not used, accumulate into .grad.
    gradients = _engine.run_backward((t,), (grad,), False, False, tuple(wanted), True, False)
    found = iter(gradients)
    return [next(found) if need else None for need in needed]


def refuse_foreign_leaves(t: Tensor, known: Sequence[Tensor], branch: nn.Module) -> None:
    """Raises if the graph of `t` ends in a tensor that would get no gradient.

    The gradient of a step goes to its streams, to the branch's parameters and to the extra
    arguments. A tensor that a branch finds elsewhere (an attribute, a closure) would get none, in
    silence.

    Args:
        t: Output of a branch, with its graph.
        known: The leaves that get their gradient.
        branch: The module that computed `t`, for the message.

    Raises:
        RuntimeError: Naming the shape of the foreign leaf.
    """
    expected = {id(tensor) for tensor in known}
    # The walk is made for each step of each pass, so it is written to be short.
    seen: set[Any] = {None}
    nodes: list[Any] = [t.grad_fn]
    for node in nodes:  # grows meanwhile
        if node in seen:
            continue
        seen.add(node)
        if type(node) is not _Leaf:
            nodes += [following for following, _ in node.next_functions]
        elif id(leaf := node.variable) not in expected:
            raise RuntimeError(
                f"branch {type(branch).__name__} uses a tensor of shape {tuple(leaf.shape)} that "
                "requires a gradient but is neither its input nor one of its parameters; it would "
                "get no gradient. Register it as an nn.Parameter of the branch, pass it by "
                "keyword (chain(x, name=tensor)), or detach it."
            )
