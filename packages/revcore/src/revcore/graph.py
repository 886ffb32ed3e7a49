"""The graph of one branch: differentiating it, and a look for what must not be there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from revcore.survey import Survey

_run_backward = torch.autograd.Variable._execution_engine.run_backward
_Leaf = torch._C._functions.AccumulateGrad

# How many nodes the last graph of a branch had, and how many leaves it was allowed. As long as
# both stay, the graph is not walked again.
_walked: WeakKeyDictionary[nn.Module, tuple[int | None, int]] = WeakKeyDictionary()


def differentiate(
    t: Tensor,
    inputs: tuple[Tensor | None, ...],
    survey: Survey,
    nodes: int | None,
    grad: Tensor,
) -> Sequence[Tensor | None]:
    """Takes the gradient of a branch's output to those of its inputs.

    Args:
        t: The output, with its graph.
        inputs: First the branch's input, None if it needs no gradient, then all else that needs
            one.
        survey: That of the branch.
        nodes: Number of nodes of the graph; None if another graph may have as many.
        grad: Gradient of the output.

    Returns:
        A gradient for each input, None where there is none.

    Raises:
        RuntimeError: If the graph ends in a tensor that is not among these.
    """
    wanted: Any = inputs if inputs[0] is not None else inputs[1:]
    if not wanted or not t.requires_grad:
        return [None] * len(inputs)
    if nodes is None or survey.walked != (nodes, len(wanted)):
        _walk(t, wanted, survey, nodes)
    if grad.dtype != t.dtype:
        grad = grad.to(t.dtype)
    # What torch.autograd.grad does after 20 microseconds of looking at its arguments. The flags:
    # keep the graph, create one, allow inputs that were not used, accumulate into .grad.
    found: Sequence[Tensor | None] = _run_backward((t,), (grad,), False, False, wanted, True, False)
    return found if wanted is inputs else (None, *found)


def _walk(t: Tensor, wanted: Sequence[Tensor], survey: Survey, nodes: int | None) -> None:
    branch = survey.modules[0]
    known = _walked.get(branch)
    survey.walked = now = (nodes, len(wanted))
    if nodes is None or known != now:
        refuse_foreign_leaves(t, wanted, branch)
        if known is None:
            _warn_of_side_results(branch)
        _walked[branch] = now


def _warn_of_side_results(branch: nn.Module) -> None:
    """Warns if a run has left tensors with gradients in attributes, as an auxiliary loss may be."""
    for name, module in branch.named_modules():
        for attribute, value in vars(module).items():
            # A weight that is computed from a weight_orig or weight_g beside it is none.
            names = [key for key, _ in module.named_parameters(recurse=False)]
            own = any(key.startswith(f"{attribute}_") for key in names)
            if isinstance(value, Tensor) and value.grad_fn is not None and not own:
                where = f"{name}.{attribute}" if name else attribute
                warnings.warn(
                    f"branch {type(branch).__name__} leaves a result in its attribute {where!r}. A "
                    "loss of it has no gradient: compute it from the chain's outputs, or store the "
                    "activations, revcore.set_reversing(model, False).",
                    stacklevel=2,
                )


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
