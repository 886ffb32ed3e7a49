"""What a block and a chain share: they run reversed or stored, there and back, compiled or not."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from revcore.arguments import Arguments, tensors_of, values_of
from revcore.compiled import WAYS, run_compiled, run_stored
from revcore.engine import Call, can_reverse, thread
from revcore.grid import GridWatch
from revcore.known import are_of_torch, draw
from revcore.parts import Part, call_part, run_parts
from revcore.remember import is_lending
from revcore.step import Step
from revcore.streams import Streams, as_streams, join, split, with_log_det
from revcore.survey import Groups
from revcore.tape import Tape
from revcore.tracing import is_traced, never_alone
from revcore.trial import Kind, find_fault

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)


def _constant(method: F) -> F:
    """Does what torch._dynamo.assume_constant_result does, without its import, of seconds."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


@_constant
def _can_reverse_compiled() -> bool:
    """Tells whether a node of our own can be traced: not for export, nor inside of a transform."""
    exporting = getattr(torch.compiler, "is_exporting", bool)()
    return not exporting and torch._C._functorch.peek_interpreter_stack() is None


@_constant
def _are_saved_tensors_hooked() -> bool:
    # Older releases of torch do not tell.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


# What Dynamo can pass to Python.
_CONSTANTS = (
    *(int, float, complex, bool, str, bytes, slice, Enum, partial, FunctionType, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Reversible(nn.Module):
    """What a block and a chain share: two directions, reversed or stored, compiled or not.

    Attributes:
        reversing: Whether to reverse (True) or store activations as plain autograd does.
        overlap: Whether a CUDA graph that is captured rebuilds each half-step while the one after
            it is differentiated, on a second stream: faster, with the memory of one more half-step.
        split_dim: Dimension along which a single input tensor is split.
        log_det: Whether to return the log-determinant too.
    """

    reversing: bool = True
    overlap: bool = True
    split_dim: int
    log_det: bool = False

    def forward(self, *x: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps one tensor to one tensor, or streams to a tuple of as many.

        Args:
            x: One tensor, which is split in equal parts along `split_dim`, or the streams, which
                may be of any sizes that the branches fit.
            kwargs: Passed to every branch. Tensors among them get their gradients.

        Returns:
            A tensor like the input, or a tuple of streams. With `log_det`, log |det J| of each
            sample comes behind it, of shape (batch,): `z, log_det = chain(x)`.

        Raises:
            ValueError: If a single tensor cannot be split in equal streams.
        """
        return self._map(x, kwargs, inverted=False)

    def inverse(self, *y: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps the output of `forward` back to its input, up to rounding.

        Takes, returns and raises what `forward` does, and keeps no activations either. The
        log-determinant is that of the inverse.
        """
        return self._map(y, kwargs, inverted=True)

    @property
    @abstractmethod
    def streams(self) -> int:
        """How many streams a single input tensor is split in."""

    @abstractmethod
    def _parts(self, count: int, split_dim: int, *, inverted: bool) -> list[Part]:
        """Lists what runs, for so many streams, which a call has split along this dimension."""

    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        """Lists the steps for so many streams, and the numbers of those whose input is kept.

        Raises:
            RuntimeError: If a block does more than its steps, which are all that is compiled.
        """
        steps: list[Step] = []
        kept: list[int] = []
        for part in self._parts(count, self.split_dim, inverted=inverted):
            hooked = part.module._forward_hooks or part.module._forward_pre_hooks
            if part.steps is None or hooked:
                raise RuntimeError(
                    f"{type(part.module).__name__} has a hook, or a forward or inverse of its own, "
                    "which does not run in a compiled chain: hook a branch or the chain instead, "
                    "let a coupling list half_steps, or compile the branches alone"
                )
            kept += [len(steps)] if part.kept else []
            steps += part.steps
        return steps, kept

    def _map(self, x: Streams, kwargs: Arguments, *, inverted: bool) -> Tensor | Streams:
        if is_traced():
            return self._compiled(x, kwargs, inverted=inverted)
        call = thread.call
        if call is None:
            # Where the compiled engine refuses a chain, torch runs it eagerly and would compile
            # parts. Dynamo takes seconds to import, which is torch's matter if it compiles and
            # never ours.
            alone = _alone_untraced if "torch._dynamo" in sys.modules else Reversible._alone
            return alone(self, x, kwargs, inverted=inverted)
        # It joins the chain around it, whose choice of reversing or storing holds for all.
        streams = split(x, self.split_dim, self.streams)
        # It is called as a module is, whose hooks see its streams.
        apart, call.apart = call.apart, call.apart or len(x) > 1
        try:
            outputs = self._run(call, streams, kwargs, inverted=inverted)
        finally:
            call.apart = apart
        return join(x, outputs, self.split_dim)

    def _run(self, call: Call, streams: Streams, kwargs: Arguments, *, inverted: bool) -> Streams:
        parts = self._parts(len(streams), call.split_dim, inverted=inverted)
        return run_parts(call, parts, streams, kwargs, inverted=inverted)

    def _alone(self, x: Streams, kwargs: Arguments, *, inverted: bool) -> Tensor | Streams:
        streams = split(x, self.split_dim, self.streams)
        tape = Tape() if self.reversing and can_reverse() else None
        # Not by setattr, which takes longer for a module.
        groups = vars(self).setdefault("_groups", Groups())
        call = thread.call = Call(tape, groups, given=tensors_of(kwargs), measures=self.log_det)
        call.apart, call.split_dim = len(x) > 1, self.split_dim
        try:
            call.expect(streams)
            outputs = self._run(call, streams, kwargs, inverted=inverted)
            if tape is not None:
                call.check(outputs)
            outputs = call.close(outputs)
        finally:
            thread.call = None
        y = join(x, outputs, self.split_dim)
        # Without gradients there are none, so that nothing old lives on, nor anything lent.
        groups.clear()
        groups.update({} if is_lending() else call.found)
        if tape is not None:
            if isinstance(y, Tensor) and len(outputs) > 1:
                # The joined output is what the next layer keeps: keep views, not the parts beside.
                sizes = [stream.shape[self.split_dim] for stream in outputs]
                outputs = tuple(y.detach().split(sizes, self.split_dim))
            tape.seal(outputs, overlap=self.overlap)
        return with_log_det(y, call.log_dets) if self.log_det else y

    def _compiled(self, x: Streams, kwargs: Arguments, *, inverted: bool) -> Tensor | Streams:
        streams = split(x, self.split_dim, self.streams)
        # Halves of a tensor have gaps, which they have not in the eager engine.
        streams = tuple([s if s.is_contiguous() else s.clone() for s in streams])
        if self.reversing and torch.is_grad_enabled() and _can_reverse_compiled():
            outputs = self._reversed(streams, kwargs, inverted=inverted)
        else:
            outputs = self._stored(streams, kwargs, inverted=inverted)
        y = join(x, outputs[: len(streams)], self.split_dim)
        return with_log_det(y, outputs[len(streams) :]) if self.log_det else y

    def _stored(self, streams: Streams, kwargs: Arguments, *, inverted: bool) -> Streams:
        if self.log_det:
            steps, _ = self._plan(len(streams), inverted=inverted)
            parts = [Part(self, [step.measured() for step in steps])]
        else:
            parts = self._parts(len(streams), self.split_dim, inverted=inverted)
        watch = GridWatch()
        for part in parts:
            if part.steps is None:
                streams = call_part(part, streams, kwargs, inverted=inverted)
            else:
                streams = run_stored(watch, part.steps, streams, kwargs)
        return watch.close(streams)

    def _reversed(self, streams: Streams, kwargs: Arguments, *, inverted: bool) -> Streams:
        if not is_traced():  # as a whole, so that this frame runs as it is
            return as_streams(_alone_untraced(self, streams, kwargs, inverted=inverted))
        if parametrize._cache_enabled:
            raise RuntimeError(f"a compiled chain cannot be in parametrize.cached(). {WAYS}")
        if _are_saved_tensors_hooked():
            raise RuntimeError(
                "a chain cannot be compiled under hooks on saved tensors (torch.utils.checkpoint, "
                "save_on_cpu): call it once outside of them before, or compile what calls them. "
                + WAYS
            )
        steps, kept = self._plan(len(streams), inverted=inverted)
        given = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        if len(tensors_of(kwargs)) > len(given):
            raise RuntimeError(
                "a compiled chain takes tensors as arguments, but none inside of lists, tuples or "
                "dicts; pass each by a keyword of its own"
            )
        if not self._is_known():
            others = {k: v for k, v in kwargs.items() if k not in given}
            for value in values_of(others):
                if not isinstance(value, _CONSTANTS):
                    raise RuntimeError(
                        f"a compiled chain takes tensors, numbers and the like as arguments, but "
                        f"no object of {type(value).__name__}; pass what it holds. {WAYS}"
                    )
            constants = {k: tree_map(_as_constant, v) for k, v in others.items()}
            kinds = [
                (
                    [_as_constant(size) for size in tensor.shape],
                    [_as_constant(size) for size in tensor.stride()],
                    tensor.dtype,
                    str(tensor.device),
                )
                for tensor in (*streams, *given.values())
            ]
            fault = self._find_fault(inverted, kinds, list(given), constants)
            if fault:
                raise RuntimeError(fault)
        if self.log_det:
            steps = [step.measured() for step in steps]
        return run_compiled(steps, kept, streams, kwargs)

    # Both run once, in Python, while Dynamo traces, which takes their results for constants.
    @_constant
    def _is_known(self) -> bool:
        """Tells whether all is torch's own or ours, which need not be tried for each size."""
        steps, _ = self._plan(self.streams, inverted=False)
        modules = [module for step in steps for module in step.branch.modules()]
        held = {parameter for step in steps for parameter in step.branch.parameters()}
        contained = are_of_torch(modules) and all(step.self_contained for step in steps)
        return contained and not draw(modules) and held.issuperset(self.parameters())

    @_constant
    def _find_fault(
        self, inverted: bool, kinds: list[Kind], names: list[str], constants: dict[str, Any]
    ) -> str:
        steps, _ = self._plan(len(kinds) - len(names), inverted=inverted)
        modules = (module for step in steps for module in step.branch.modules())
        if any(isinstance(module, Reversible) for module in modules):
            return f"a chain inside of a branch cannot be compiled with the one around it. {WAYS}"
        if self.log_det:
            steps = [step.measured() for step in steps]
        return find_fault(steps, kinds, names, constants)


_alone_untraced = _disable_dynamo(Reversible._alone)
never_alone(Reversible._reversed)


def _as_constant(value: Any) -> Any:
    """Makes a constant of a number, which for a compiler is a symbol if it was another before."""
    # By way of text, because a symbol stays one under int() alone.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(f"{value}") if isinstance(value, int) else float(f"{value}")


def set_reversing(module: M, enabled: bool) -> M:
    """Makes every reversible block and chain in a module reverse, or store its activations.

    Both modes have the same state dict, and compute the same bits in the forward pass unless a
    branch takes other kernels without gradients, as `nn.MultiheadAttention` does in evaluation.
    Storing is faster and takes memory in proportion to depth; it allows what reversing cannot do,
    such as double backward.

    Args:
        module: Any module.
        enabled: True to reverse, False to store activations as plain autograd does.

    Returns:
        The same module.

    Raises:
        TypeError: If `enabled` is neither.

    Example:
        >>> from torch import nn
        >>> from revcore import ReversibleBlock
        >>> block = set_reversing(ReversibleBlock(nn.Linear(4, 4)), False)
        >>> block.reversing
        False
    """
    if enabled not in (True, False):
        raise TypeError(f"enabled (={enabled!r}) must be True or False")
    for part in module.modules():
        if isinstance(part, Reversible):
            part.reversing = bool(enabled)
    return module
