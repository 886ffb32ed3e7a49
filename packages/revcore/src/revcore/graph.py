"""A look into a branch's graph, for what must not be there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def refuse_foreign_leaves(t: Tensor, known: Sequence[Tensor], branch: nn.Module) -> None:
    """Raises if the graph of `t` ends in a tensor that would get no gradient.

    The gradient of a half-step goes to its streams, to the branch's parameters and to the extra
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
    expected |= {id(tensor.grad_fn) for tensor in known if tensor.grad_fn is not None}
    seen = set()
    stack = [t.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or id(node) in expected:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in expected:
            raise RuntimeError(
                f"branch {type(branch).__name__} uses a tensor of shape {tuple(leaf.shape)} that "
                "requires a gradient but is neither its input nor one of its parameters; it would "
                "get no gradient. Register it as an nn.Parameter of the branch, pass it by "
                "keyword (chain(x, name=tensor)), or detach it."
            )
        stack.extend(following for following, _ in node.next_functions)
