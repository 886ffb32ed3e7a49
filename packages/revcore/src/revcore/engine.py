"""The eager engine: one autograd node for a block, or for some.

A node has the streams and the parameters of the branches as inputs, and the new streams as output.
It saves nothing. Its backward takes the steps from the last to the first: it asks the tape for the
streams after the step, runs the branch once more with gradients on, reconstructs the old target
from that same run, and differentiates: forward 1 + recompute 1 + backward 2, that is 4/3 of a step
that stores its activations. Autograd's order guarantees that later nodes come first.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from revcore.arguments import tensors_of
from revcore.autocast import no_autocast_cache
from revcore.graph import refuse_foreign_leaves
from revcore.grid import GridWatch
from revcore.replay import Replay, Seen, run_branch
from revcore.step import Step
from revcore.streams import Streams, join, split, with_log_det
from revcore.survey import Groups
from revcore.tape import Tape
from revcore.versions import versions


class _Call:
    """One forward call of a chain, or of a block or coupling alone.

    Attributes:
        groups: Those of the container's branches.
        branches: How many of them this call has come to.
        watch: Keeps the call on its grid.
        tape: What a reversing call records; None for one that stores.
        tip: The streams that a reversing call expects next, with their versions.
        apart: Whether somebody gets the streams one by one.
        given: The tensors among its extra arguments.
        measures: Whether the steps give their log-determinants.
        log_dets: Those that they have given.
    """

    def __init__(
        self, tape: Tape | None, groups: Groups | None = None, *, measures: bool = False
    ) -> None:
        self.groups = Groups() if groups is None else groups
        self.branches = 0
        self.apart = False
        self.given: list[Tensor] = []
        self.measures = measures
        self.log_dets: list[Tensor] = []
        self.watch = GridWatch()
        self.tape = tape
        self.tip: tuple[Streams, list[int]] = ((), [])

    def expect(self, streams: Streams) -> None:
        self.tip = streams, versions(streams)

    def check(self, streams: Streams) -> None:
        """Raises if these are not the streams that are expected."""
        tip, counts = self.tip
        if versions(streams) != counts or not all(map(_same_data, streams, tip)):
            raise RuntimeError(
                "the streams between two blocks of a reversible chain were changed, by a hook, by "
                "an in-place operation or by a coupling's own forward, so the chain cannot be "
                "reversed. Make the change a block of its own, or split the chain there."
            )


class _Thread(threading.local):
    """The call that is running forward in this thread.

    A branch runs with none, so that chains inside it have calls of their own.
    """

    call: _Call | None = None


_thread = _Thread()


class _StepsNode(torch.autograd.Function):
    """Steps in a row, reversed: from all streams to those that they change."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *_inputs: Tensor) -> Streams:
        call, tape, streams, records, changed = plan
        count, first = len(streams), len(tape.records)
        tape.records += records
        ctx.visit = tape, range(first, len(tape.records)), count, changed
        _thread.call = None
        try:
            for index, (step, replay) in enumerate(records, first):
                before: Streams = ()
                if tape.drift is not None or not step.repeats:
                    before = tuple(streams[:count])
                if tape.drift is not None:
                    tape.truth.append(tuple(x.detach() for x in before))
                call.watch.apply(step, replay.first_run, streams)
                if not step.repeats and replay.moved and index not in tape.anchors:
                    tape.keep_before(index, before)
                    _warn_of_a_kept_input(step)
                del before  # or the first one is alive until the last
        finally:
            _thread.call = call
        return (*[streams[index] for index in changed], *streams[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True). Store the "
                "activations where you need second derivatives: "
                "revcore.set_reversing(model, False)."
            )
        if torch.is_inference_mode_enabled():
            return outside_inference(_StepsNode.backward, ctx, *grads)
        tape, steps, count, changed = ctx.visit
        every: list[Tensor | None] = [None] * count
        for index, grad in zip(changed, grads):  # noqa: B905 - log-determinants may follow
            every[index] = grad
        every += grads[len(changed) :]
        retain = bool(torch._C._autograd._get_current_graph_task_keep_graph())
        found = tape.differentiate(steps, every, retain=retain)
        return (None, *every, *found)


def outside_inference(
    backward: Callable[..., tuple[Tensor | None, ...]], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Differentiates outside of inference mode, in which no graph can be made again."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return backward(ctx, *(None if grad is None else grad.clone() for grad in grads))


_Records = list[tuple[Step, Replay]]


class _Plan(NamedTuple):
    """What a node does.

    Attributes:
        call: The forward call that it is part of.
        tape: That call's tape.
        streams: All streams, which are replaced by those after the steps.
        records: The steps, and how to repeat their branches.
        changed: Indices of the streams that the steps change.
    """

    call: _Call
    tape: Tape
    streams: list[Tensor]
    records: _Records
    changed: list[int]


def _warn_of_a_kept_input(step: Step) -> None:
    warnings.warn(
        f"{type(step.branch).__name__} draws random numbers or changes buffers, to which its "
        "inverse may come in another order, so a reversible chain keeps its input: memory for "
        "each such call. A Coupling, whose branches run as before, needs none.",
        stacklevel=2,
    )


def run(
    steps: Sequence[Step], streams: Streams, kwargs: Mapping[str, Any], *, inside: bool = False
) -> Streams:
    """Runs steps: reversed where a chain is recording in this thread, stored otherwise.

    Args:
        steps: The steps.
        streams: What they change.
        kwargs: Extra arguments of all branches.
        inside: Whether other steps follow that write all streams, so that nobody sees these.
    """
    call = _thread.call
    if call is None:
        call = _Call(None)
        return call.watch.close(_run(call, steps, streams, kwargs))
    if call.tape is None:
        return _run(call, steps, streams, kwargs)
    call.check(streams)
    apart, call.apart = call.apart, call.apart and not inside
    streams = _run(call, steps, streams, kwargs)
    call.apart = apart
    call.expect(streams)
    return streams


def _run(
    call: _Call, steps: Sequence[Step], streams: Streams, kwargs: Mapping[str, Any]
) -> Streams:
    if call.measures:
        steps = [step.measured() for step in steps]
    current = call.watch.enter(steps, streams)
    for index, stream in enumerate(current):
        if not stream.is_contiguous():
            current[index] = dense(stream)
    try:
        if call.tape is None:
            _run_each(_run_stored, call, steps, current, kwargs)
        else:
            _run_reversed(call, call.tape, steps, current, kwargs)
    except IndexError:
        most = max(index for step in steps for index in (*step.inputs, *step.writes))
        if most < len(streams):
            raise
        raise ValueError(
            f"the coupling works on {most + 1} streams or more, got {len(streams)}"
        ) from None
    if call.measures:
        call.log_dets += current[len(streams) :]
        del current[len(streams) :]
    return tuple(current)


def _run_reversed(
    call: _Call,
    tape: Tape,
    steps: Sequence[Step],
    streams: list[Tensor],
    kwargs: Mapping[str, Any],
) -> None:
    """Runs steps as a node, from the first that needs a gradient."""
    records: _Records = []
    needs = [stream.requires_grad for stream in streams]
    group = call.groups.get(call.branches, [step.branch for step in steps])
    call.branches += len(steps)
    seen = Seen(group, kwargs, call.given)
    for step, survey in zip(steps, group.surveys, strict=True):
        replay = Replay(step, survey, seen, kwargs)
        replay.needs_x = True in map(needs.__getitem__, step.inputs)
        if replay.needs_x or replay.leaves:
            for index in step.writes:
                needs[index] = True
        if tape.records or True in needs:
            records.append((step, replay))
    if len(records) < len(steps):
        # A frozen prefix needs no gradient, so nothing will ever ask for the streams before it; an
        # input that was kept there is not that of the first step on the tape.
        tape.anchors.clear()
        count = len(streams)
        _run_each(_run_frozen, call, steps[: len(steps) - len(records)], streams, kwargs)
        call.log_dets += streams[count:]
        del streams[count:]
    count = len(streams)
    log_dets: list[Tensor] = []
    for part in _cut(records) if call.apart else [records] if records else []:
        _run_node(call, tape, part, streams)
        log_dets += streams[count:]
        del streams[count:]
    streams += log_dets


def _cut(records: _Records) -> list[_Records]:
    """Cuts before steps that read what one before them has written last.

    Whoever gets the streams one by one may ask for the gradient of one that another is made of.
    """
    cuts, written, read = [len(records)], set[int](), set[int]()
    for index, (step, _) in reversed(list(enumerate(records))):
        if not read.isdisjoint(set(step.writes) - written):
            cuts.append(index + 1)
            read.clear()
        written.update(step.writes)
        read.update(step.inputs)
    return [records[a:b] for a, b in pairwise([0, *reversed(cuts)]) if a < b]


def _run_node(call: _Call, tape: Tape, records: _Records, streams: list[Tensor]) -> None:
    changed = list(dict.fromkeys(index for step, _ in records for index in step.writes))
    # Gradients are found from the last step to the first, and one that several steps share adds up
    # in that order, as it does where activations are stored.
    leaves = [leaf for _, replay in reversed(records) for leaf in replay.leaves]
    plan = _Plan(call, tape, streams.copy(), records, changed)
    outputs = _StepsNode.apply(plan, *streams, *leaves)
    for index, output in zip(changed, outputs):  # noqa: B905 - log-determinants may follow
        streams[index] = output
    streams += outputs[len(changed) :]


def _run_each(
    run: Callable[..., Tensor],
    call: _Call,
    steps: Sequence[Step],
    streams: list[Tensor],
    kwargs: Mapping[str, Any],
) -> None:
    """Runs steps without a node."""
    for step in steps:
        call.watch.apply(step, partial(run, step, kwargs), streams)


def _run_frozen(step: Step, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    t = _run_alone(step, kwargs, x)
    if t.requires_grad:
        refuse_foreign_leaves(t, (), f"branch {type(step.branch).__name__}")
    return t


def _run_stored(step: Step, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    # The view gathers the branch's gradients of x before they meet the stream's own, as the node
    # does, so that both modes add up in the same order. So do the gradients of a weight that is
    # used twice if it is cast twice, as in a reversing call.
    with nullcontext() if step.grid is None else no_autocast_cache():
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
        overlap: Whether to rebuild a step while the one after it is differentiated.
        split_dim: Dimension along which one tensor is split.
        streams: How many streams one tensor is split in.
        log_det: Whether the log-determinant is returned, behind the output.
    """

    reversing: bool
    log_det: bool
    overlap: bool
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
        return _run_apart(body, x, kwargs)
    split_dim = container.split_dim
    streams = split(x, split_dim, container.streams)
    if joined:
        return join(x, body(*streams, **kwargs), split_dim)
    # Where the compiled engine refuses a chain, torch runs it eagerly and would compile parts.
    # Dynamo takes seconds to import, which is torch's matter if it compiles and never ours.
    alone = _reverse_untraced if "torch._dynamo" in sys.modules else _reverse_alone
    return alone(container, body, x, streams, kwargs)


def _run_apart(body: Callable[..., Streams], x: Streams, kwargs: Mapping[str, Any]) -> Streams:
    """Runs a block of a chain that is called as a module is, whose hooks see its streams."""
    call: Any = _thread.call
    apart, call.apart = call.apart, True
    try:
        return body(*x, **kwargs)
    finally:
        call.apart = apart


def _reverse_alone(
    container: Container,
    body: Callable[..., Streams],
    x: tuple[Tensor, ...],
    streams: Streams,
    kwargs: Mapping[str, Any],
) -> Tensor | Streams:
    split_dim = container.split_dim
    tape = Tape() if container.reversing and can_reverse() else None
    # Not by setattr, which takes longer for a module.
    groups = Groups(vars(container).get("_groups"))
    call = _thread.call = _Call(tape, groups, measures=container.log_det)
    call.apart, call.given = len(x) > 1, tensors_of(kwargs) if kwargs else []
    try:
        call.expect(streams)
        outputs = body(*streams, **kwargs)
        if tape is not None:
            call.check(outputs)
        outputs = call.watch.close(outputs)
    finally:
        _thread.call = None
    if tape is not None:
        groups.close()
        vars(container)["_groups"] = groups
    y = join(x, outputs, split_dim)
    if tape is not None and isinstance(y, Tensor):
        # The joined output is what the next layer keeps: keep views, not the parts beside it.
        sizes = [stream.shape[split_dim] for stream in outputs]
        tape.seal(y.detach().split(sizes, split_dim), overlap=container.overlap)
    elif tape is not None:
        tape.seal(outputs, overlap=container.overlap)
    return with_log_det(y, call.log_dets) if container.log_det else y


_reverse_untraced = _disable_dynamo(_reverse_alone)


def is_apart() -> bool:
    """Tells whether somebody gets the streams of the call that is running one by one."""
    return _thread.call is not None and _thread.call.apart


def keep(streams: Streams) -> None:
    """Keeps the streams as they stand, if a chain is recording, to restart from exactly."""
    if _thread.call is not None and _thread.call.tape is not None:
        _thread.call.tape.keep(streams)


def can_reverse() -> bool:
    """Tells whether nodes of our own can be recorded."""
    # Without grad mode nothing is stored anyway. torch.jit.trace, transforms of torch.func and
    # forward-mode derivatives cannot see through an autograd.Function with a tape.
    return (
        torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def dense(x: Tensor) -> Tensor:
    """Returns `x`, copied if it is a view with gaps, in the same order of dimensions.

    The halves of a split tensor have gaps, and kernels may give other bits for other strides. A
    reconstructed stream has none, so the branch must never see any.
    """
    # Images in channels_last are the usual case, and asking for that takes a quarter of the time.
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone()


def _same_data(a: Tensor, b: Tensor) -> bool:
    # Hooks such as FSDP's hand on an alias that has a node of its own in the graph.
    return a is b or bool(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )
