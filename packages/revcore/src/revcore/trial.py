"""Trying a chain out before it is compiled: can each of its branches be repeated in one graph?

What cannot is found out by running copies of the branches, on made-up data. On data, because
tensors without any are not seen to change, and stay behind wherever a branch keeps a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revcore.adding import AddingStep
from revcore.arguments import Arguments, takes_gradient
from revcore.autocast import autocast_now
from revcore.buffers import Copy
from revcore.compiled import WAYS, repeated_buffers, run_as, statistics_of
from revcore.graph import ForeignLeafError, refuse_foreign_leaves
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
from revcore.step import Step
from revcore.survey import Survey
from revcore.versions import version

_RANDOM = (
    "random numbers in a branch cannot be repeated in a compiled chain. Compile without dropout. "
    + WAYS
)
_OF_STATISTICS = (
    "a branch reads statistics that a batch norm changes, which a compiled chain cannot repeat. "
    + WAYS
)

Kind = tuple[list[int], list[int], torch.dtype, str]
"""Shape, stride, dtype and device of a tensor, as torch.compile can pass them."""


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
    branches = [step.branch for step in steps]
    changing = {id(buffer) for branch in branches for buffer in statistics_of(branch).values()}
    for branch in branches:
        if not changing.isdisjoint(id(branch.get_buffer(n)) for n in repeated_buffers(branch)):
            return _OF_STATISTICS
    tensors = [_make_up(*kind) for kind in kinds]
    count = len(tensors) - len(names)
    streams = tensors[:count]
    kwargs = {**constants, **dict(zip(names, tensors[count:], strict=True))}
    try:
        for step in steps:
            streams = _try_out(step, streams, kwargs)
    except RandomnessError:
        return _RANDOM
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
    autocast = autocast_now(("cpu", streams[0].device.type))
    # A compiled branch adds to no stream by itself.
    apply: Any = HalfStep.apply if type(step) is AddingStep else type(step).apply
    try:
        with _compiling(), torch.enable_grad(), _Watch(statistics_of(branch).values()):
            apply(step, partial(run_as, autocast, step.call, **kwargs), streams)
    finally:
        moved = any(a is not b for a, b in zip(states, get_states(devices), strict=True))
        set_states(states)
    if moved:  # where the watch cannot see, as inside of a custom operation
        raise RandomnessError(_RANDOM)
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
    statistics = {*map(id, statistics_of(branch).values())}
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
        super().__init__(_RANDOM)
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
            raise _UnrepeatableError(_OF_STATISTICS)
        return super().__torch_dispatch__(func, types, args, kwargs)
