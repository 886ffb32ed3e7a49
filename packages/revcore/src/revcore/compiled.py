"""The compiled engine: one autograd node for a chain, which `torch.compile` can trace.

Dynamo cannot follow the tape of the eager engine, but it can follow a loop over steps with
`torch.func.vjp`. Forward keeps the last streams; backward walks down from them, as the eager engine
does, in one graph. A branch is repeated as a function of its parameters and buffers, so nothing has
to be put back afterwards.

Where something cannot be repeated here an error is raised while tracing. With `fullgraph=True` it
reaches the user; without, torch falls back to the eager engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.stateless import _reparametrize_module

from revcore.arguments import Arguments, takes_gradient
from revcore.autocast import Autocast, autocast_now
from revcore.grid import GridWatch
from revcore.step import Pullback, Step
from revcore.streams import Streams

WAYS = (
    "Compile the branches instead of the chain (branch.compile()), or store the activations: "
    "revcore.set_reversing(model, False)."
)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# A step, the names of its branch's parameters, and those of the buffers that a second run must find
# as the first one found them.
_Branch = tuple[Step, list[str], list[str]]


def run_stored(
    watch: GridWatch, steps: Sequence[Step], streams: Streams, kwargs: Arguments
) -> Streams:
    """Runs steps that store their activations while torch.compile traces.

    Args:
        watch: Keeps the call on its grid.
        steps: The steps, in order.
        streams: The input.
        kwargs: Extra arguments of all branches.
    """
    current = [*watch.enter(steps, streams)]
    for step in steps:
        watch.apply(step, partial(step.call, **kwargs), current)
    return tuple(current)


def run_compiled(
    steps: Sequence[Step], kept: Sequence[int], streams: Streams, kwargs: Arguments
) -> Streams:
    """Runs the steps of a whole chain, reversed, while torch.compile traces.

    Args:
        steps: All steps, in order.
        kept: Numbers of the steps whose input streams are kept.
        streams: The input.
        kwargs: Extra arguments of all branches.

    Raises:
        RuntimeError: If the steps cannot be traced.
    """
    if any(step.grid is not None for step in steps):
        raise RuntimeError(
            "a fixed-point chain cannot be compiled as a whole: its forward pass and its "
            "repetition would be two graphs, which may round differently. Compile its branches, "
            "branch.compile()."
        )
    branches: list[_Branch] = []
    leaves: list[Tensor] = []
    for step in steps:
        named = {n: p for n, p in step.branch.named_parameters() if takes_gradient(p)}
        branches.append((step, list(named), repeated_buffers(step.branch)))
        leaves += named.values()
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    # Such as a mask. They come first, so that the others can be differentiated with the parameters.
    fixed = [name for name in names if not takes_gradient(kwargs[name])]
    names = [*fixed, *(name for name in names if name not in fixed)]
    # The node keeps them, and its outputs, and does not see it there if they are changed in place.
    given = [kwargs[name].clone() for name in names]
    tensors = [*streams, *given, *leaves]
    # Views, because a tensor that came twice would get the gradient of one place alone.
    outputs: Streams = _ChainNode.apply(
        (branches, set(kept), dict(kwargs), names, len(fixed)),
        len(streams),
        *[tensor.view_as(tensor) for tensor in tensors],
    )
    return tuple([output.clone() for output in outputs])


class _ChainNode(torch.autograd.Function):
    """A chain, reversed: all streams to all streams."""

    @staticmethod
    def forward(ctx: Any, plan: Any, count: int, *tensors: Tensor) -> Streams:
        branches, kept, kwargs, names, _ = plan
        ctx.plan = plan
        ctx.autocast = autocast_now(("cpu", tensors[0].device.type))
        buffers = [
            step.branch.get_buffer(name).clone() for step, _, found in branches for name in found
        ]
        given, leaves = tensors[count : count + len(names)], tensors[count + len(names) :]
        kwargs = {**kwargs, **dict(zip(names, given, strict=True))}
        streams, anchors = list(tensors[:count]), []
        for number, (step, *_) in enumerate(branches):
            if number in kept:
                anchors += streams[:count]  # behind them are log-determinants
            step.apply(partial(step.call, **kwargs), streams)
        parts = (streams[:count], anchors, buffers, given, leaves)
        ctx.sizes = [len(part) for part in parts]
        ctx.save_for_backward(*[tensor for part in parts for tensor in part])
        return tuple(streams)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        branches, kept, kwargs, names, fixed = ctx.plan
        saved = list(ctx.saved_tensors)
        streams, anchors, buffers, arguments, leaves = [
            [saved.pop(0) for _ in range(size)] for size in ctx.sizes
        ]
        kwargs = {**kwargs, **dict(zip(names[:fixed], arguments[:fixed], strict=True))}
        names, arguments = names[fixed:], arguments[fixed:]
        stream_grads = list(grads)
        leaf_grads: list[Tensor] = []
        argument_grads = [torch.zeros_like(argument) for argument in arguments]
        for number in reversed(range(len(branches))):
            step, parameters, found = branches[number]
            own = [leaves.pop() for _ in parameters][::-1]
            state = {name: buffers.pop() for name in reversed(found)}
            before = None
            if number in kept:
                before = tuple([anchors.pop() for _ in streams][::-1])
            again = _Again(step, kwargs, ctx.autocast, names, parameters, state, [*arguments, *own])
            gradients = step.rebuild(again, streams, before)(stream_grads)
            extra, own_grads = gradients[: len(names)], gradients[len(names) :]
            argument_grads = [a + b for a, b in zip(argument_grads, extra, strict=True)]
            leaf_grads = [*own_grads, *leaf_grads]
        return (None, None, *stream_grads, *[None] * fixed, *argument_grads, *leaf_grads)


class _Again(NamedTuple):
    """Runs a branch again, for torch.compile to trace.

    That is a function of its input and of `leaves`: the tensors among the arguments, and the
    parameters.
    """

    step: Step
    kwargs: Arguments
    autocast: Autocast
    names: Sequence[str]
    parameters: Sequence[str]
    buffers: Mapping[str, Tensor]
    leaves: Sequence[Tensor]

    def run(self, x: Tensor, *leaves: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        branch = self.step.branch
        arguments, own = leaves[: len(self.names)], leaves[len(self.names) :]
        state = dict(zip(self.parameters, own, strict=True))
        for name, buffer in branch.named_buffers():
            # A clone, because the branch may change it, and the first run has done so already.
            state[name] = self.buffers.get(name, buffer).clone()
        kwargs = {**self.kwargs, **dict(zip(self.names, arguments, strict=True))}
        with _reparametrize_module(branch, state, tie_weights=True):
            # What torch.func.functional_call does, which can only call a module, no method of it.
            function = self.step.call if call is None else call
            y: Tensor = run_as(self.autocast, function, x, **kwargs)
            return y

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        return self.run(x, *self.leaves, call=call)

    def record(self, x: Tensor) -> tuple[Tensor, Pullback]:
        t, pull, *_ = torch.func.vjp(self.run, x, *self.leaves)
        return t, lambda grad: pull(grad.to(t.dtype))

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return run_as(self.autocast, function, *arguments)


def run_as(
    autocast: Autocast, function: Callable[..., Any], x: Tensor, /, *args: Any, **kwargs: Any
) -> Any:
    """Calls a function under an autocast that was, in a way that torch.compile can trace."""
    states, kind = dict(autocast), x.device.type
    # Twice the CPU's does no harm.
    with (
        torch.autocast("cpu", dtype=states.get("cpu"), enabled="cpu" in states),
        torch.autocast(kind, dtype=states.get(kind), enabled=kind in states),
    ):
        return function(x, *args, **kwargs)


def repeated_buffers(branch: nn.Module) -> list[str]:
    """Names the buffers that a second run must find as they were."""
    statistics = statistics_of(branch)
    return [name for name, _ in branch.named_buffers() if name not in statistics]


def statistics_of(branch: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of normalizations in training, which these change and do not read."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in branch.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and module.training and isinstance(module, _NormBase)
        if name in _STATISTICS
    }
