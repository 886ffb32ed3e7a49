"""The eager engine: one autograd node per half-step.

The node of a half-step has the target stream, the source stream and the branch's parameters as
inputs, and the new target stream as output. It saves nothing. Its backward asks the tape for the
streams after the half-step, runs the branch once more with gradients on, reconstructs the old
target from that same run, and differentiates: forward 1 + recompute 1 + backward 2, that is 4/3 of
a step that stores its activations. Autograd adds up the gradients of a stream, and its order
guarantees that later half-steps come first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from revcore.graph import refuse_foreign_leaves
from revcore.half_step import HalfStep
from revcore.replay import Replay, run_branch, version
from revcore.streams import Streams, join, split
from revcore.tape import Record, Tape


class _Recording(threading.local):
    """The chain that is running forward in this thread, if any."""

    tape: Tape | None = None
    tip: tuple[tuple[Tensor, int], ...] | None = None  # the streams that it expects next

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets a branch run, in which other chains record for themselves."""
        outside = self.tape, self.tip
        self.tape = self.tip = None
        try:
            yield
        finally:
            self.tape, self.tip = outside


_recording = _Recording()


class _HalfStepNode(torch.autograd.Function):
    """`streams[target] <- combine(streams[target], branch(streams[source]))`, reversed."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, index: int, a: Tensor, b: Tensor, *_leaves: Tensor) -> Tensor:
        ctx.tape, ctx.index = tape, index
        step, replay = tape.records[index]
        with _recording.paused():
            t = replay.first_run(b.detach())
        return step.apply(a, t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True). Store the "
                "activations where you need second derivatives: "
                "revcore.set_reversing(model, False)."
            )
        (grad,) = grads
        tape, index = ctx.tape, ctx.index
        retain = _graph_is_retained()
        streams = tape.seek(index + 1, retain=retain)
        step, replay = tape.records[index]

        b = replay.lay_out(streams[step.source]).detach()
        needs_b, needs_leaves = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        b.requires_grad_(needs_b)
        with torch.enable_grad():
            leaves, t = replay.repeat_for_gradients(b)
        wanted = [b] if needs_b else []
        wanted += [leaf for leaf, needed in zip(leaves, needs_leaves, strict=True) if needed]

        a = tape.anchor(index)
        before = a[step.target] if a is not None else step.undo(streams[step.target], t.detach())
        grad_a, grad_t = step.vjp(before, t.detach(), grad)
        # The streams after the step are not needed any more; drop them before the graph is walked.
        streams[step.target] = before
        found: list[Tensor | None] = [None] * len(wanted)
        if t.requires_grad:
            refuse_foreign_leaves(t, (b, *leaves), replay.branch)
            if wanted:
                found = list(torch.autograd.grad(t, wanted, grad_t.to(t.dtype), allow_unused=True))
        tape.leave(index, a if a is not None else streams, retain=retain)

        rest = iter(found)
        grad_b = next(rest) if needs_b else None
        grad_leaves = (next(rest) if needed else None for needed in needs_leaves)
        return (None, None, grad_a, grad_b, *grad_leaves)


def _graph_is_retained() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def run(steps: Sequence[HalfStep], streams: Streams, kwargs: Mapping[str, Any]) -> Streams:
    """Runs half-steps: reversed where a chain is recording in this thread, stored otherwise."""
    tape = _recording.tape
    if tape is None:
        return _run_stored(steps, streams, kwargs)
    _refuse_replaced(streams)
    current = list(streams)
    for step in steps:
        current[step.target] = _run_step(tape, step, current, kwargs)
    _recording.tip = tuple((stream, version(stream)) for stream in current)
    return tuple(current)


def _run_step(
    tape: Tape, step: HalfStep, streams: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> Tensor:
    _refuse_index(step, len(streams))
    replay = Replay(step.branch, kwargs)
    a, b = streams[step.target], dense(streams[step.source])
    if not tape.records and not any(x.requires_grad for x in (a, b, *replay.leaves)):
        # A frozen prefix needs no gradient, so nothing will ever ask for the streams before it.
        with _recording.paused():
            t = run_branch(step.branch, b, kwargs)
        if t.requires_grad:
            refuse_foreign_leaves(t, (), step.branch)
        return step.apply(a, t)
    tape.records.append(Record(step, replay))
    out: Tensor = _HalfStepNode.apply(tape, len(tape.records) - 1, a, b, *replay.leaves)
    return out


def _run_stored(steps: Sequence[HalfStep], streams: Streams, kwargs: Mapping[str, Any]) -> Streams:
    current = list(streams)
    for step in steps:
        _refuse_index(step, len(current))
        b = dense(current[step.source])
        # The view gathers the branch's gradients of b before they meet the stream's own, as the
        # node of a half-step does, so that both modes add up in the same order.
        t = run_branch(step.branch, b.view_as(b), kwargs)
        current[step.target] = step.apply(current[step.target], t)
    return tuple(current)


def reverse(
    body: Callable[..., Streams],
    x: Sequence[Tensor],
    split_dim: int,
    kwargs: Mapping[str, Any],
    *,
    reversing: bool,
) -> Tensor | Streams:
    """Runs `body`, which maps streams to streams, on a tape of its own.

    Inside another chain's recording the body joins that chain, whose choice of reversing or
    storing holds for all of it.

    Args:
        body: Calls blocks, which call `run`.
        x: One tensor, or several streams.
        split_dim: Dimension along which one tensor is split.
        kwargs: Extra arguments that all branches get.
        reversing: Whether to reverse or to store activations.

    Returns:
        One tensor, or a tuple of streams, as `x` was.
    """
    streams = split(x, split_dim)
    if _recording.tape is not None or not reversing or not _can_reverse():
        return join(x, body(*streams, **kwargs), split_dim)
    tape = Tape(kwargs)
    _recording.tape, _recording.tip = tape, tuple((s, version(s)) for s in streams)
    try:
        outputs = body(*streams, **kwargs)
        _refuse_replaced(outputs)
    finally:
        _recording.tape = _recording.tip = None
    y = join(x, outputs, split_dim)
    # The joined output is what the next layer keeps: keep views of it, not the halves beside it.
    if isinstance(y, Tensor):
        sizes = [stream.shape[split_dim] for stream in outputs]
        tape.seal(y.detach().split(sizes, split_dim))
    else:
        tape.seal(outputs)
    return y


def keep(streams: Streams) -> None:
    """Keeps the streams as they stand, if a chain is recording, to restart from exactly."""
    if _recording.tape is not None:
        _recording.tape.keep(streams)


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
    if x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone()


def _refuse_index(step: HalfStep, count: int) -> None:
    if max(step.target, step.source) >= count:
        raise ValueError(
            f"the coupling works on {max(step.target, step.source) + 1} streams or more, "
            f"got {count}"
        )


def _refuse_replaced(streams: Streams) -> None:
    tip = _recording.tip
    if (
        tip is None
        or len(tip) != len(streams)
        or not all(
            version(stream) == count and _same_data(stream, seen)
            for stream, (seen, count) in zip(streams, tip, strict=True)
        )
    ):
        raise RuntimeError(
            "the streams between two blocks of a reversible chain were changed, by a hook or by an "
            "in-place operation, so the chain cannot be reversed. Make the change a block of its "
            "own, or split the chain there."
        )


def _same_data(a: Tensor, b: Tensor) -> bool:
    # Hooks such as FSDP's hand on an alias that has a node of its own in the graph.
    return a is b or bool(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )
