"""Where the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient is infinite or not a number, so there is nothing left to train.

    The weights, the optimizer's state and all buffers are as they were before the step.

    Attributes:
        step: The step that would have been taken, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def find_origin(
    loss_of: Callable[..., Tensor], model: nn.Module, x: Tensor, *more: Tensor
) -> tuple[int, str]:
    """Repeats a step in eager mode and looks at every number; the model keeps all it has.

    Args:
        loss_of: Computes the loss from all that follows.
        model: The network. Of a reversible block the branches are looked at too.
        x: The batch.
        *more: What else the loss depends on.

    Returns:
        A rank in the order of the computation (the smaller, the earlier), and what was found there
        in words; the rank is that of no module if all is finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].weight, float("inf"))
        >>> find_origin(lambda net, x: net(x).sum(), net, torch.ones(1, 2))
        (1, "the output of module '0' (Linear)")
    """
    names = {module: name for name, module in model.named_modules()}
    # What was found first in each part of the step.
    found: list[tuple[int, str]] = [] if _finite(x) else [(0, "the images")]
    seen, forward = 0, True

    def look(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal seen
        if not forward:
            return
        seen += 1
        outputs = output if isinstance(output, tuple) else (output,)
        if not all(_finite(y) for y in outputs if isinstance(y, Tensor)):
            where = f"module {names[module]!r} ({type(module).__name__})"
            found.append((seen, f"the output of {where}"))

    with _untouched(model):
        handles = [module.register_forward_hook(look) for module in names]
        try:
            loss = loss_of(model, x, *more)
            forward = False
            if not _finite(loss):
                found.append((seen + 1, "the loss"))
            # Whatever was found: other processes may have found nothing, and layers that work
            # together, such as SyncBatchNorm, need all of them. The hooks stay on, for a module
            # with hooks may compute in another way, and reversible blocks run theirs once more.
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        # The backward pass begins at the last parameter.
        parameters = list(model.named_parameters())[::-1]
        for position, (name, parameter) in enumerate(parameters, start=seen + 2):
            if parameter.grad is not None and not _finite(parameter.grad):
                found.append((position, f"the gradient of parameter {name!r}"))
    if found:
        return min(found)
    return seen + 2 + len(parameters), "nothing, when the step was repeated"


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts buffers and gradients back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad
