"""The graph of one branch: differentiating it, and a look for what must not be there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revcore.cuda_graphs import are_in_use, lasting
from revcore.survey import Survey

_run_backward = torch.autograd.Variable._execution_engine.run_backward
_Leaf = torch._C._functions.AccumulateGrad


def differentiate(
    t: Tensor, inputs: tuple[Tensor, ...], survey: Survey, has_arguments: bool, grad: Tensor | None
) -> Sequence[Tensor | None]:
    """Takes the gradient of a branch's output to those of its inputs.

    Args:
        t: The output, with its graph.
        inputs: First the branch's input, then all else that needs a gradient.
        survey: That of the branch.
        has_arguments: Whether the branch got extra arguments, in which there may be other tensors.
        grad: Gradient of the output; None for zeros.

    Returns:
        A gradient for each input, None where there is none.

    Raises:
        RuntimeError: If the graph ends in a tensor that is not among these.
    """
    wanted: Any = inputs if inputs[0].requires_grad else inputs[1:]
    if t.requires_grad and (has_arguments or not (survey.contained and survey.walked)):
        survey.walked = True
        refuse_foreign_leaves(t, inputs, f"branch {survey.name}", inputs[0])
    if grad is None or not (t.requires_grad and wanted):
        return [None] * len(inputs)
    if grad.dtype != t.dtype:
        grad = grad.to(t.dtype)
    # What torch.autograd.grad does after 20 microseconds of looking at its arguments. The flags:
    # keep the graph, create one, allow inputs that were not used, accumulate into .grad.
    flags = survey.holds_results, False, wanted, True, False
    try:
        found: Any = _run_backward((t,), (grad,), *flags)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            f"branch {survey.name} calls torch.utils.checkpoint with use_reentrant=True, which "
            "cannot be differentiated in a reversible chain. Pass use_reentrant=False, or call the "
            "module without it: a chain keeps no activations of its branches."
        ) from error
    if are_in_use():
        found = [None if each is None else lasting(each) for each in found]
    return found if wanted is inputs else (None, *found)


def warn_of_a_result(branch: nn.Module, module: nn.Module, attribute: str) -> None:
    """Warns of a tensor that a branch has left in an attribute, as an auxiliary loss may be."""
    name = next((n for n, part in branch.named_modules() if part is module), "")
    where = f"{name}.{attribute}" if name else attribute
    warnings.warn(
        f"branch {type(branch).__name__} leaves a result in its attribute {where!r}. A loss of it "
        "has no gradient: compute it from the chain's outputs, or store the activations, "
        "revcore.set_reversing(model, False).",
        stacklevel=2,
    )


class ForeignLeafError(RuntimeError):
    """A graph ends in a tensor that would get no gradient."""


def refuse_foreign_leaves(
    t: Tensor, known: Sequence[Tensor], what: str, x: Tensor | None = None
) -> None:
    """Raises if the graph of `t` ends in a tensor that would get no gradient.

    The gradient of a step goes to its streams, to the branch's parameters and to the extra
    arguments. A tensor that a branch finds elsewhere (an attribute, a closure) would get none, in
    silence.

    Args:
        t: A result that requires a gradient, with its graph.
        known: The leaves that get their gradient.
        what: What computed it, for the message.
        x: The input of what computed it. If it requires no gradient, the branch may have made a
            leaf of it, as one does that differentiates an energy.

    Raises:
        ForeignLeafError: Naming the shape of the foreign leaf.
    """
    expected = {*map(id, known)}
    if t.grad_fn is None and id(t) not in expected:
        raise _foreign(t, what)
    seen: set[Any] = {t.grad_fn, None}
    nodes: list[Any] = [] if t.grad_fn is None else [t.grad_fn]
    for node in nodes:  # grows meanwhile
        for following, _ in node.next_functions:
            if following in seen:
                continue
            seen.add(following)
            if type(following) is not _Leaf:
                nodes.append(following)
            elif id(leaf := following.variable) not in expected and not _is_made_of(leaf, x):
                raise _foreign(leaf, what)


def _is_made_of(leaf: Tensor, x: Tensor | None) -> bool:
    if x is None or x.requires_grad or leaf.layout is not x.layout or leaf.shape != x.shape:
        return False
    return leaf.data_ptr() == x.data_ptr()


def _foreign(leaf: Tensor, what: str) -> ForeignLeafError:
    return ForeignLeafError(
        f"{what} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient but is "
        "neither its input nor one of its parameters; it would get no gradient. Register it as an "
        "nn.Parameter of the branch (and use it as self.name, if it has a hook), pass it by "
        "keyword (chain(x, name=tensor), itself or in a plain dict, list or tuple), detach it, or "
        "store the activations: revcore.set_reversing(model, False). A branch that differentiates "
        "by a leaf that it makes can do so by torch.func.grad. With FSDP apply fully_shard "
        "to the block, or to what calls revcore.recompute, not to the module that these run."
    )
