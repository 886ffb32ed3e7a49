"""The compiled engine: one autograd node for a chain, which `torch.compile` can trace.

Dynamo cannot follow the tape of the eager engine, but it can follow a loop over steps with
`torch.func.vjp`. Forward keeps the last streams; backward walks down from them, as the eager engine
does, in one graph. A branch is repeated as a function of its parameters and buffers, so nothing has
to be put back afterwards.

Where something cannot be repeated here an error is raised while tracing. With `fullgraph=True` it
reaches the user; without, torch falls back to the eager engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revcore.adding import AddingStep
from revcore.arguments import Arguments, takes_gradient
from revcore.autocast import Autocast, autocast_now
from revcore.buffers import Copy
from revcore.graph import ForeignLeafError, refuse_foreign_leaves
from revcore.grid import GridWatch
from revcore.half_step import HalfStep
from revcore.randomness import (
    RandomnessError,
    RefuseRandomness,
    argument_of,
    get_states,
    set_states,
)
from revcore.remember import Memory, thread
from revcore.snapshot import Snapshot, duplicate, held_by
from revcore.step import Pullback, Step
from revcore.streams import Streams
from revcore.survey import Survey
from revcore.versions import version

WAYS = (
    "Compile the branches instead of the chain (branch.compile()), or store the activations: "
    "revcore.set_reversing(model, False)."
)
RANDOM = (
    "random numbers in a branch cannot be repeated in a compiled chain. Compile without dropout. "
    + WAYS
)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# A step, the names of its branch's parameters, and those of the buffers that a second run must find
# as the first one found them.
_Branch = tuple[Step, list[str], list[str]]

Kind = tuple[list[int], list[int], torch.dtype, str]
"""Shape, stride, dtype and device of a tensor, as torch.compile can pass them."""


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
        branches.append((step, list(named), _repeated_buffers(step.branch)))
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
    names: Sequence[str] = ()
    parameters: Sequence[str] = ()
    buffers: Mapping[str, Tensor] = {}
    leaves: Sequence[Tensor] = ()

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
            y: Tensor = self.compute(self.step.call if call is None else call, x, **kwargs)
            return y

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        return self.run(x, *self.leaves, call=call)

    def record(self, x: Tensor) -> tuple[Tensor, Pullback]:
        t, pull, *_ = torch.func.vjp(self.run, x, *self.leaves)
        return t, lambda grad: pull(grad.to(t.dtype))

    def compute(self, function: Callable[..., Any], /, *arguments: Any, **kwargs: Any) -> Any:
        states, kind = dict(self.autocast), arguments[0].device.type
        # Twice the CPU's does no harm.
        with (
            torch.autocast("cpu", dtype=states.get("cpu"), enabled="cpu" in states),
            torch.autocast(kind, dtype=states.get(kind), enabled=kind in states),
        ):
            return function(*arguments, **kwargs)


def find_fault(
    steps: Sequence[Step], kinds: Sequence[Kind], names: Sequence[str], constants: Mapping[str, Any]
) -> str:
    """Runs copies of steps on made-up data, to see whether they can be repeated.

    Args:
        steps: What to run.
        kinds: Those of the streams, then of the arguments.
        names: Names of the arguments that are tensors.
        constants: The other arguments.

    Returns:
        What is wrong: a branch draws random numbers or changes something, or a tensor would get no
        gradient. Else nothing.
    """
    modules = [module for step in steps for module in step.branch.modules()]
    if any(module._backward_hooks or module._backward_pre_hooks for module in modules):
        return f"backward hooks of a branch's modules cannot be compiled. {WAYS}"
    tensors = [_make_up(*kind) for kind in kinds]
    count = len(tensors) - len(names)
    streams = tensors[:count]
    kwargs = {**constants, **dict(zip(names, tensors[count:], strict=True))}
    try:
        for step in steps:
            streams = _try_out(step, streams, kwargs)
    except RandomnessError:
        return RANDOM
    except (ForeignLeafError, _UnrepeatableError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - of the user's code
        return (
            "a branch cannot be tried out on made-up data, as it must before its chain is "
            f"compiled: {type(error).__name__}: {error}. {WAYS}"
        )
    return ""


def _try_out(original: Step, streams: list[Tensor], kwargs: Arguments) -> list[Tensor]:
    """Runs a copy of a step, and returns the streams after it.

    Raises:
        RuntimeError: If it cannot be repeated.
    """
    scheme = getattr(original, "scheme", original.branch)
    held = [module for module in (original.branch, scheme) if isinstance(module, nn.Module)]
    step = duplicate(original, *held)
    branch, count = step.branch, len(streams)
    before = [x.detach().requires_grad_(takes_gradient(x)) for x in streams]
    streams = list(before)
    known = [*branch.parameters(), *before]
    devices = list(dict.fromkeys(tensor.device for tensor in known))
    snapshot, states = Snapshot(Survey(branch).modules), get_states(devices)
    again = _Again(step, kwargs, autocast_now(("cpu", streams[0].device.type)))
    # A compiled branch adds to no stream by itself.
    apply: Any = HalfStep.apply if type(step) is AddingStep else type(step).apply
    try:
        with _compiling(), torch.enable_grad(), _Watch(_statistics(branch).values()):
            apply(step, partial(again.compute, step.call, **kwargs), streams)
    finally:
        moved = any(a is not b for a, b in zip(states, get_states(devices), strict=True))
        set_states(states)
    if moved:  # where the watch cannot see, as inside of a custom operation
        raise RandomnessError(RANDOM)
    for stream in streams:
        if stream.requires_grad:
            refuse_foreign_leaves(stream, known, "a branch or a coupling")
    change = _find_change(branch, original.branch)
    if change is None and not snapshot.holds():
        change = "an attribute"
    if change is not None:
        name = type(branch).__name__
        raise _UnrepeatableError(
            f"branch {name} changes {change}, which a compiled chain cannot repeat. {WAYS}"
        )
    return streams[:count]


def _find_change(branch: nn.Module, original: nn.Module) -> str | None:
    """Names a tensor that a run of a copy has changed, but for statistics of normalizations."""
    statistics = {*map(id, _statistics(branch).values())}
    pairs = zip(Survey(branch).modules, Survey(original).modules, strict=False)
    for now, before in pairs:
        for kind, tables in {
            "parameter": (now._parameters, before._parameters),
            "buffer": (now._buffers, before._buffers),
            "attribute": [dict(enumerate(held_by(module)[0])) for module in (now, before)],
        }.items():
            for name, tensor in tables[0].items():
                if not isinstance(tensor, Tensor) or id(tensor) in statistics:
                    continue
                if Copy(tensor, None, version(tensor), tables[1][name]).has_moved():
                    return f"its {kind} {name!r}" if isinstance(name, str) else "an attribute"
    return None


def _make_up(shape: list[int], stride: list[int], dtype: torch.dtype, device: str) -> Tensor:
    """Creates a tensor for branches to be tried out on."""
    x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if 0 in stride:  # which cannot be filled
        x = torch.empty(shape, dtype=dtype, device=device)
    if not takes_gradient(x):
        return x.fill_(dtype == torch.bool)  # what is no mask may be an index
    # A generator of our own, and of no kind of device that has none.
    return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets branches do what they do while they are traced, and none but that."""
    compiler: Any = torch.compiler
    # Newer releases of torch have said so already, of the whole process.
    sets = not compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    memory, thread.memory = thread.memory, _NoMemory()
    try:
        with (
            disable_saved_tensors_hooks(
                "hooks on saved tensors (torch.utils.checkpoint) cannot be compiled in a branch"
            ),
            _NoLook(),
        ):
            yield
    finally:
        thread.memory = memory
        if sets:
            compiler._is_compiling_flag = False


class _UnrepeatableError(RuntimeError):
    """A branch does what a compiled chain cannot repeat."""


class _NoLook(TorchFunctionMode):
    """Raises on what makes numbers of tensors, for Python to decide by."""

    _looks = frozenset(
        getattr(Tensor, name)
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._looks:
            raise _UnrepeatableError(f"a branch looks at its data ({func.__name__}). {WAYS}")
        return func(*args, **(kwargs or {}))


class _NoMemory(Memory):
    def ask(self, compute: Callable[[], Any]) -> Any:
        raise _UnrepeatableError(
            f"a branch calls revcore.remember, of which a compiled chain remembers nothing. {WAYS}"
        )


class _Watch(RefuseRandomness):
    """Raises on what no compiled chain can repeat.

    Args:
        statistics: Buffers that a second run does not find as they were.
    """

    supports_higher_order_operators = True

    def __init__(self, statistics: Iterable[Tensor]) -> None:
        super().__init__(RANDOM)
        self._statistics = [*statistics]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload):  # such as torch.cond
            return func(*args, **kwargs or {})
        # What normalizations do with theirs.
        usual: tuple[str, ...] = ("self",) if func is torch.ops.aten.add_.Tensor else ()
        if "batch_norm" in str(func) and argument_of(func, "training", args, kwargs) is not False:
            usual = ("running_mean", "running_var")
        names = (argument.name for argument in func._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        read = tree_leaves([value for name, value in given.items() if name not in usual])
        if any(value is each for value in read for each in self._statistics):
            raise _UnrepeatableError(
                "a branch reads statistics that its batch norm changes, which a compiled chain "
                f"cannot repeat. {WAYS}"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def _repeated_buffers(branch: nn.Module) -> list[str]:
    """Names the buffers that a second run must find as they were."""
    statistics = _statistics(branch)
    return [name for name, _ in branch.named_buffers() if name not in statistics]


def _statistics(branch: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of normalizations in training, which these change and do not read."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in branch.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and module.training and isinstance(module, _NormBase)
        if name in _STATISTICS
    }
