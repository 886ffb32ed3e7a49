"""The compiled engine: one autograd node for a chain, which `torch.compile` can trace.

Dynamo cannot follow the tape of the eager engine, but it can follow a loop over steps with
`torch.func.vjp`. Forward keeps the last streams; backward walks down from them, as the eager engine
does, in one graph. A branch is repeated as a function of its parameters and buffers, so nothing has
to be put back afterwards.

Where something cannot be repeated here an error is raised while tracing. With `fullgraph=True` it
reaches the user; without, torch falls back to the eager engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves

from revcore.adding import AddingStep
from revcore.arguments import Arguments, takes_gradient
from revcore.autocast import Autocast, autocast_now
from revcore.buffers import Copy, copy_all
from revcore.graph import ForeignLeafError, refuse_foreign_leaves
from revcore.grid import GridWatch
from revcore.half_step import HalfStep
from revcore.known import BATCH_NORMS
from revcore.randomness import RandomnessError, RefuseRandomness, argument_of
from revcore.remember import Memory, thread
from revcore.snapshot import Snapshot
from revcore.step import Pullback, Step
from revcore.streams import Streams

WAYS = (
    "Compile the branches instead of the chain (branch.compile()), or store the activations: "
    "revcore.set_reversing(model, False)."
)
RANDOM = (
    "random numbers in a branch cannot be repeated in a compiled chain. Compile without dropout. "
    + WAYS
)

_OF_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# A step, the names of its branch's parameters, and those of the buffers that a second run must find
# as the first one found them.
_Branch = tuple[Step, list[str], list[str]]

Kind = tuple[list[int], torch.dtype, str]
"""Shape, dtype and device of a tensor, as torch.compile can pass them."""


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
    """Runs steps on made-up data, to see whether they can be repeated.

    Args:
        steps: What to run.
        kinds: Those of the streams, then of the arguments.
        names: Names of the arguments that are tensors.
        constants: The other arguments.

    Returns:
        What is wrong: a branch draws random numbers, changes buffers or looks at its data, or a
        tensor would get no gradient. Else nothing.
    """
    modules = list(dict.fromkeys(module for step in steps for module in step.branch.modules()))
    if any(module._backward_hooks or module._backward_pre_hooks for module in modules):
        return f"backward hooks of a branch's modules cannot be compiled. {WAYS}"
    snapshot = Snapshot(modules)
    fault = _find_fault(steps, kinds, names, constants)
    if snapshot.holds():
        return fault
    snapshot.put_back({})
    kinds_of = " or ".join(sorted({type(step.branch).__name__ for step in steps}))
    what = f"a branch ({kinds_of}) changes an attribute, which a compiled chain cannot. {WAYS}"
    return fault or what


def _find_fault(
    steps: Sequence[Step], kinds: Sequence[Kind], names: Sequence[str], constants: Mapping[str, Any]
) -> str:
    tensors = [_make_up(*kind) for kind in kinds]
    count = len(tensors) - len(names)
    streams = tensors[:count]
    kwargs = {**constants, **dict(zip(names, tensors[count:], strict=True))}
    autocast = autocast_now(("cpu", streams[0].device.type))
    known = [parameter for step in steps for parameter in step.branch.parameters()]
    try:
        for step in steps:
            streams = [x.detach().requires_grad_(takes_gradient(x)) for x in streams]
            probe, before = _Probe(step, kwargs, autocast), list(streams)
            probe.watch = _Watch()
            with _compiling(), torch.enable_grad(), probe.watch:
                # A compiled branch adds to no stream by itself.
                apply: Any = HalfStep.apply if type(step) is AddingStep else type(step).apply
                apply(step, probe.run, streams)
            probe.refuse_changes()
            for stream in streams:
                if stream.requires_grad:
                    refuse_foreign_leaves(stream, known + before, "a branch or a coupling")
    except RandomnessError:
        return RANDOM
    except (ForeignLeafError, _UnrepeatableError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - of the user's code
        return f"a branch cannot be tried out: {type(error).__name__}: {error}. {WAYS}"
    return ""


def _make_up(shape: list[int], dtype: torch.dtype, device: str) -> Tensor:
    """Creates a tensor for branches to be tried on, which are refused if they look at its data."""
    x = torch.ones(shape, dtype=dtype, device=device)
    if not takes_gradient(x):
        return x if dtype == torch.bool else x.zero_()  # what is no mask may be an index
    # A generator of our own, and of no kind of device that has none.
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.copy_(random)


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets branches do what they do while they are traced, and none but that."""
    compiler: Any = torch.compiler
    outer, compiler._is_compiling_flag = compiler._is_compiling_flag, True
    outer_memory, thread.memory = thread.memory, _NoMemory()
    try:
        with disable_saved_tensors_hooks("they cannot be compiled in a branch"):
            yield
    finally:
        compiler._is_compiling_flag, thread.memory = outer, outer_memory


class _UnrepeatableError(RuntimeError):
    """A branch does what a compiled chain cannot repeat."""


class _NoMemory(Memory):
    def ask(self, compute: Callable[[], Any]) -> Any:
        raise _UnrepeatableError(
            f"a branch calls revcore.remember, of which a compiled chain remembers nothing. {WAYS}"
        )


class _Watch(RefuseRandomness):
    """Raises on what no compiled chain can repeat.

    Attributes:
        statistics: The `id` of buffers that a second run does not find as they were.
    """

    statistics: frozenset[int] = frozenset()

    def __init__(self) -> None:
        super().__init__(RANDOM)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _OF_DATA.intersection(func.tags):
            raise _UnrepeatableError(f"a branch looks at its data ({func}). {WAYS}")
        # What batch norms do with theirs.
        usual = func is torch.ops.aten.add_.Tensor or (
            "batch_norm" in str(func) and argument_of(func, "training", args, kwargs) is not False
        )
        if not usual and not self.statistics.isdisjoint(map(id, tree_leaves((args, kwargs)))):
            raise _UnrepeatableError(
                "a branch reads statistics that its batch norm changes, which a compiled chain "
                f"cannot repeat. {WAYS}"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Probe(_Again):
    """Notes what a run does to buffers: the copies of a graph may be made after the change."""

    watch: _Watch
    found: Sequence[tuple[str, Copy, Tensor | None]] = ()

    def compute(self, function: Callable[..., Any], /, *arguments: Any, **kwargs: Any) -> Any:
        branch = self.step.branch
        # Counters are changed by normalizations, too, which do not read them.
        names = [n for n in _repeated_buffers(branch) if not n.endswith("num_batches_tracked")]
        pairs = [(branch.get_buffer(name), None) for name in names]
        others = [buffer for name, buffer in branch.named_buffers() if name not in names]
        copies = copy_all(pairs)
        self.watch.statistics = frozenset(map(id, others))
        result = super().compute(function, *arguments, **kwargs)
        self.watch.statistics = frozenset()  # others get their addresses
        now = dict(branch.named_buffers())
        self.found = [(name, copy, now.get(name)) for name, copy in zip(names, copies, strict=True)]
        return result

    def refuse_changes(self) -> None:
        for name, copy, buffer in self.found:
            if buffer is not copy.buffer or copy.has_moved():
                raise _UnrepeatableError(
                    f"branch {type(self.step.branch).__name__} changes its buffer {name!r}, which "
                    f"a compiled chain cannot repeat. {WAYS}"
                )


def _repeated_buffers(branch: nn.Module) -> list[str]:
    """Names the buffers that must be what they were; batch norms in training read none."""
    names: list[str] = []
    for prefix, module in branch.named_modules():
        if not (module.training and type(module) in BATCH_NORMS):
            names += [name for name, _ in module.named_buffers(prefix, recurse=False)]
    return names
