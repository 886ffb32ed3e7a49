"""The eager engine: one autograd node per step.

The node of a half-step has the target stream, the source stream and the branch's parameters as
inputs, and the new target stream as output. It saves nothing. Its backward asks the tape for the
streams after the half-step, runs the branch once more with gradients on, reconstructs the old
target from that same run, and differentiates: forward 1 + recompute 1 + backward 2, that is 4/3 of
a step that stores its activations. Autograd adds up the gradients of a stream, and its order
guarantees that later steps come first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from revcore.compiled import run_compiled
from revcore.graph import refuse_foreign_leaves
from revcore.grid import GridWatch
from revcore.replay import Replay, run_branch
from revcore.step import Step
from revcore.streams import Streams, join, split, with_log_det
from revcore.tape import Tape
from revcore.versions import version


class _Call:
    """One forward call of a chain, or of a block or coupling alone.

    Attributes:
        watch: Keeps the call on its grid.
        tape: What a reversing call records; None for one that stores.
        tip: The streams that a reversing call expects next, with their versions.
        measures: Whether the steps give their log-determinants.
        log_dets: Those that they have given.
    """

    def __init__(self, tape: Tape | None, *, measures: bool = False) -> None:
        self.measures = measures
        self.log_dets: list[Tensor] = []
        self.watch = GridWatch()
        self.tape = tape
        self.tip: list[tuple[Tensor, int]] = []

    def expect(self, streams: Sequence[Tensor]) -> None:
        self.tip = [(stream, version(stream)) for stream in streams]

    def check(self, streams: Sequence[Tensor]) -> None:
        """Raises if these are not the streams that are expected."""
        same = len(streams) == len(self.tip)
        for stream, (seen, count) in zip(streams, self.tip):  # noqa: B905 - compared above
            if (stream is not seen and not _same_data(stream, seen)) or version(stream) != count:
                same = False
        if not same:
            raise RuntimeError(
                "the streams between two blocks of a reversible chain were changed, by a hook or by"
                " an in-place operation, so the chain cannot be reversed. Make the change a block "
                "of its own, or split the chain there."
            )


class _Thread(threading.local):
    """The call that is running forward in this thread.

    A branch runs with none, so that chains inside it have calls of their own.
    """

    call: _Call | None = None


_thread = _Thread()


class _StepNode(torch.autograd.Function):
    """One step, reversed: the streams that it reads to those that it writes."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, index: int, *inputs: Tensor) -> Streams:
        ctx.tape, ctx.index = tape, index
        step, replay = tape.records[index]
        call, _thread.call = _thread.call, None
        try:
            return step.apply(replay.first_run, inputs[: len(step.reads)])
        finally:
            _thread.call = call

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True). Store the "
                "activations where you need second derivatives: "
                "revcore.set_reversing(model, False)."
            )
        tape, index = ctx.tape, ctx.index
        retain = bool(torch._C._autograd._get_current_graph_task_keep_graph())
        streams = tape.seek(index + 1, retain=retain)
        step, replay = tape.records[index]
        needed = ctx.needs_input_grad[2:]
        found = step.backward(replay, streams, tape.anchor(index), grads, needed)
        tape.leave(index, streams, retain=retain)
        return (None, None, *found)


def run(steps: Sequence[Step], streams: Streams, kwargs: Mapping[str, Any]) -> Streams:
    """Runs steps: reversed where a chain is recording in this thread, stored otherwise."""
    if torch.compiler.is_compiling():
        return run_compiled(steps, (), streams, kwargs, reversing=False)
    call = _thread.call
    if call is None:
        call = _Call(None)
        return call.watch.close(_run(call, steps, streams, kwargs))
    if call.tape is None:
        return _run(call, steps, streams, kwargs)
    call.check(streams)
    streams = _run(call, steps, streams, kwargs)
    call.expect(streams)
    return streams


def _run(
    call: _Call, steps: Sequence[Step], streams: Streams, kwargs: Mapping[str, Any]
) -> Streams:
    watch, tape = call.watch, call.tape
    current = list(streams)
    for step in (step.measured() for step in steps) if call.measures else steps:
        if not watch.entered or watch.bits != step.grid:
            current = watch.enter(step.grid, current)
        try:
            inputs = [current[index] for index in step.reads]
        except IndexError:
            raise ValueError(
                f"the coupling works on {max(step.reads) + 1} streams or more, got {len(current)}"
            ) from None
        for index, x in enumerate(inputs):
            if not x.is_contiguous():
                inputs[index] = dense(x)
        if tape is None:
            outputs = step.apply(partial(_run_stored, step, kwargs), inputs)
        else:
            before = len(tape.records)
            outputs = _run_reversed(tape, step, inputs, kwargs)
            if tape.drift is not None and len(tape.records) > before:
                tape.truth.append(tuple(stream.detach() for stream in current))
        if watch.bits is not None:
            watch.note(outputs)
        call.log_dets += outputs[len(step.writes) :]
        for index, output in zip(step.writes, outputs):  # noqa: B905 - log_det may follow
            current[index] = output
    return tuple(current)


def _run_reversed(
    tape: Tape, step: Step, inputs: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> Streams:
    replay = Replay(step.branch, step.call, kwargs, step.grid is not None)
    records = tape.records
    if not records and not any(x.requires_grad for x in (*inputs, *replay.leaves)):
        # A frozen prefix needs no gradient, so nothing will ever ask for the streams before it; an
        # input that was kept there is not that of the first step on the tape.
        tape.anchors.clear()
        return step.apply(partial(_run_frozen, step, kwargs), inputs)
    records.append((step, replay))
    outputs: Streams = _StepNode.apply(tape, len(records) - 1, *inputs, *replay.leaves)
    return outputs


def _run_frozen(step: Step, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    t = _run_alone(step, kwargs, x)
    if t.requires_grad:
        refuse_foreign_leaves(t, (), step.branch)
    return t


def _run_stored(step: Step, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    # The view gathers the branch's gradients of x before they meet the stream's own, as the node of
    # a step does, so that both modes add up in the same order.
    return _run_alone(step, kwargs, x.view_as(x))


def _run_alone(step: Step, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    call, _thread.call = _thread.call, None
    try:
        return run_branch(step.call, x, kwargs)
    finally:
        _thread.call = call


class Container(Protocol):
    """What has blocks: a chain, or a block alone.

    Attributes:
        reversing: Whether to reverse or to store activations.
        split_dim: Dimension along which one tensor is split.
        streams: How many streams one tensor is split in.
        log_det: Whether the log-determinant is returned, behind the output.
    """

    reversing: bool
    log_det: bool
    split_dim: int

    @property
    def streams(self) -> int: ...


def reverse(
    container: Container,
    body: Callable[..., Streams],
    x: tuple[Tensor, ...],
    kwargs: Mapping[str, Any],
) -> Tensor | Streams:
    """Runs `body`, which maps streams to streams, on a tape of its own.

    Inside another chain's call the body joins that chain, whose choice of reversing or storing
    holds for all of it.

    Args:
        container: Says how.
        body: Calls blocks, which call `run`.
        x: One tensor, or several streams.
        kwargs: Extra arguments that all branches get.

    Returns:
        One tensor, or a tuple of streams, as `x` was.
    """
    joined = _thread.call is not None
    if joined and len(x) > 1:
        return body(*x, **kwargs)
    split_dim = container.split_dim
    streams = split(x, split_dim, container.streams)
    if joined:
        return join(x, body(*streams, **kwargs), split_dim)
    y: Tensor | Streams = _reverse_alone(container, body, x, streams, kwargs)
    return y


# Where the compiled engine refuses a chain, torch runs it eagerly and would compile parts of this.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _reverse_alone(
    container: Container,
    body: Callable[..., Streams],
    x: tuple[Tensor, ...],
    streams: Streams,
    kwargs: Mapping[str, Any],
) -> Tensor | Streams:
    split_dim = container.split_dim
    tape = Tape() if container.reversing and _can_reverse() else None
    call = _thread.call = _Call(tape, measures=container.log_det)
    try:
        call.expect(streams)
        outputs = body(*streams, **kwargs)
        if tape is not None:
            call.check(outputs)
        outputs = call.watch.close(outputs)
    finally:
        _thread.call = None
    y = join(x, outputs, split_dim)
    if tape is not None and isinstance(y, Tensor):
        # The joined output is what the next layer keeps: keep views, not the parts beside it.
        sizes = [stream.shape[split_dim] for stream in outputs]
        tape.seal(y.detach().split(sizes, split_dim))
    elif tape is not None:
        tape.seal(outputs)
    return with_log_det(y, call.log_dets) if container.log_det else y


def keep(streams: Streams) -> None:
    """Keeps the streams as they stand, if a chain is recording, to restart from exactly."""
    if _thread.call is not None and _thread.call.tape is not None:
        _thread.call.tape.keep(streams)


def _can_reverse() -> bool:
    # Without grad mode nothing is stored anyway. Transforms of torch.func and forward-mode
    # derivatives cannot see through an autograd.Function with a tape.
    return (
        torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def dense(x: Tensor) -> Tensor:
    """Returns `x`, copied if it is a view with gaps, in the same order of dimensions.

    The halves of a split tensor have gaps, and kernels may give other bits for other strides. A
    reconstructed stream has none, so the branch must never see any.
    """
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone()


def _same_data(a: Tensor, b: Tensor) -> bool:
    # Hooks such as FSDP's hand on an alias that has a node of its own in the graph.
    return bool(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )
