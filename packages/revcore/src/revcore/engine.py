"""The eager engine: one autograd node for a block, or for some.

A node has the streams and the parameters of the branches as inputs, and the new streams as output.
It saves nothing. Its backward takes the steps from the last to the first: it asks the tape for the
streams after the step, runs the branch once more with gradients on, reconstructs the old target
from that same run, and differentiates: forward 1 + recompute 1 + backward 2, that is 4/3 of a step
that stores its activations. Autograd's order guarantees that later nodes come first.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revcore.arguments import Arguments, values_of
from revcore.autocast import no_autocast_cache
from revcore.graph import refuse_foreign_leaves
from revcore.grid import GridWatch, sums_of
from revcore.replay import Replay
from revcore.running import run_branch
from revcore.seen import Seen
from revcore.step import Step
from revcore.streams import Streams, dense, in_transform
from revcore.survey import Group, Groups, modules_among
from revcore.tape import Tape
from revcore.tracing import is_traced
from revcore.versions import versions

# A view would get other strides where a dimension has size 1, and kernels go by them.
_alias = torch.ops.aten.alias


@dataclass(eq=False)
class Call:
    """One forward call of a chain, or of a block or coupling alone.

    Attributes:
        tape: What a reversing call records; None for one that stores.
        groups: Those of the container's branches at the call before.
        found: Those of this call.
        apart: Whether somebody gets the streams one by one.
        split_dim: Dimension along which they are joined for modules that know nothing of them.
        given: The tensors among its extra arguments.
        measures: Whether the steps give their log-determinants.
        log_dets: The sum of those that they have given, if there is one.
        branches: How many branches this call has come to.
        watch: Keeps the call on its grid.
        keeps: Whether to keep the streams as they stand before the next step.
        used: Indices of the streams that steps read or change, where there are more than two.
        tip: The streams that a reversing call expects next, with their versions.
    """

    tape: Tape | None = None
    groups: Groups = field(default_factory=Groups)
    found: dict[int, Group] = field(default_factory=dict)
    apart: bool = False
    split_dim: int = 1
    given: Sequence[Tensor] = ()
    measures: bool = False
    log_dets: Streams = ()
    branches: int = 0
    watch: GridWatch = field(default_factory=GridWatch)
    keeps: bool = False
    used: set[int] = field(default_factory=set)
    tip: tuple[Streams, list[int]] = ((), [])

    def expect(self, streams: Streams) -> None:
        self.tip = streams, versions(streams)

    def close(self, streams: Streams) -> Streams:
        """Ends the call, and returns the streams.

        Raises:
            ValueError: If no step has to do with one of them.
            OverflowError: If a value was too large for the grid.
        """
        idle = sorted({*range(len(streams))} - self.used) if self.used else []
        if idle:
            raise ValueError(
                f"of {len(streams)} streams no block reads or changes number {idle[0]}, counted "
                "from 0; pass what is no stream (a mask, a condition) by keyword"
            )
        return self.watch.close(streams)

    def check(self, streams: Streams) -> None:
        """Raises if these are not the streams that are expected."""
        tip, counts = self.tip
        if versions(streams) != counts or not all(map(_same_data, streams, tip)):
            raise RuntimeError(
                "the streams between two blocks of a reversible chain were changed, by a hook, an "
                "in-place operation, a coupling's own forward, block.compile() or a cast of FSDP, "
                "so the chain cannot be reversed. Make the change a block of its own, or split the "
                "chain there; compile branches (branch.compile()) or the chain; give FSDP's "
                "MixedPrecisionPolicy cast_forward_inputs=False and no output_dtype, and use "
                "autocast; or store the activations: revcore.set_reversing(model, False)."
            )


class _Thread(threading.local):
    """The call that is running forward in this thread.

    Steps run with none, so that chains inside of branches have calls of their own.
    """

    call: Call | None = None


thread = _Thread()


class _StepsNode(torch.autograd.Function):
    """Steps in a row, reversed: from all streams to those that they change."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, records: list[Replay], changed: list[int], count: int, *inputs: Tensor
    ) -> Streams:
        # The second run may take such derivatives, too.
        torch._C._set_fwd_grad_enabled(True)
        tape: Any = call.tape
        streams, first = list(inputs[:count]), len(tape.records)
        tape.records += records
        tape.nodes += 1
        if first == 0 and records[0].step.grid is not None:
            tape.sums = sums_of(streams)
        measured = sum(replay.step.measures for replay in records)
        ctx.visit = tape, range(first, len(tape.records)), count, changed, measured
        # What the loss does not depend on gets no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        for index, replay in enumerate(records, first):
            step = replay.step
            before: Streams = () if step.repeats else tuple(streams[:count])
            if tape.drift is not None:
                tape.truth.append(tuple(x.detach() for x in streams[:count]))
            call.watch.apply(step, replay.first_run, streams)
            if not step.repeats and index not in tape.anchors and replay.end():
                tape.keep(index, before)
                _warn_of_a_kept_input(step)
            del before  # or the first one is alive until the last
            if step.measures:
                streams[count:] = _sum_of(streams[count:])
        return (*[streams[index] for index in changed], *streams[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible chain cannot be differentiated twice (create_graph=True), nor can a "
                "recomputed module. Where you need second derivatives store the activations, "
                "revcore.set_reversing(model, False), and call the module itself."
            )
        if torch.is_inference_mode_enabled():
            # In it no graph can be made again.
            with torch.inference_mode(mode=False), torch.no_grad():
                copies: Any = (None if grad is None else grad.clone() for grad in grads)
                return _StepsNode.backward(ctx, *copies)
        tape, steps, count, changed, measured = ctx.visit
        every: list[Tensor | None] = [None] * count
        for index, grad in zip(changed, grads):  # noqa: B905 - a log-determinant may follow
            every[index] = grad
        every += grads[len(changed) :] * measured
        retain = bool(torch._C._autograd._get_current_graph_task_keep_graph())
        # Another pass may come for nodes that this one leaves out.
        whole = steps.stop == len(tape.records) and (
            steps.start == 0 or _is_any_executed(ctx, count)
        )
        found = tape.differentiate(steps, every, retain=retain, whole=whole)
        return (None, None, None, None, *every, *found)


def _is_any_executed(ctx: Any, count: int) -> bool:
    """Tells whether a node that gave one of the first inputs is a part of this backward pass."""
    if is_traced():  # the backward pass, which has no nodes then
        return False
    leaf = torch._C._functions.AccumulateGrad  # of which torch cannot tell
    nodes = [node for node, _ in ctx.next_functions[:count] if node and type(node) is not leaf]
    return any(map(torch._C._will_engine_execute_node, nodes))


def _warn_of_a_kept_input(step: Step) -> None:
    warnings.warn(
        f"{type(step.branch).__name__} draws random numbers or changes buffers, to which its "
        "inverse may come in another order, or has a hook, which its inverse knows nothing of, so "
        "a reversible chain keeps its input: memory for each such call. A Coupling, whose branches "
        "run as before, needs none.",
        stacklevel=2,
    )


def run(steps: Sequence[Step], streams: Streams, kwargs: Arguments) -> Streams:
    """Runs steps: reversed where a chain is recording in this thread, stored otherwise.

    Args:
        steps: The steps.
        streams: What they change.
        kwargs: Extra arguments of all branches.
    """
    call = thread.call
    if call is None:
        call = Call()
        return call.close(run_in(call, steps, streams, kwargs))
    if call.tape is None:
        return run_in(call, steps, streams, kwargs)
    call.check(streams)
    streams = run_in(call, steps, streams, kwargs)
    call.expect(streams)
    return streams


def run_in(call: Call, steps: Sequence[Step], streams: Streams, kwargs: Arguments) -> Streams:
    """Runs steps as a part of a call."""
    if len(streams) > 2:
        call.used.update(*(step.inputs + step.writes for step in steps))
    if call.measures:
        steps = [step.measured() for step in steps]
    streams = tuple(call.watch.enter(steps, streams))
    if call.keeps and call.tape is not None:
        call.tape.keep(len(call.tape.records), streams)
    call.keeps = False
    current = [x if x.is_contiguous() else dense(x) for x in streams]
    outer, thread.call = thread.call, None
    try:
        # Whoever gets the streams one by one may ask for the gradient of one that another is made
        # of.
        for part in [[step] for step in steps] if call.apart else [steps]:
            if call.tape is not None:
                _run_reversed(call, call.tape, part, current, kwargs)
                continue
            around = dict(enumerate(current))
            if call.watch.bits is not None and torch.is_grad_enabled():
                # Here the gradients of uses in this part meet, as a node adds them up.
                current[:] = [*map(_alias, current)]
            _run_each(call, part, current, partial(_run_stored, kwargs))
            # What a node does not change it does not give, either.
            for index in around.keys() - {index for step in part for index in step.writes}:
                current[index] = around[index]
    except IndexError:
        most = max(index for step in steps for index in (*step.inputs, *step.writes))
        if most < len(streams):
            raise
        raise ValueError(
            f"the coupling works on {most + 1} streams or more, got {len(streams)}"
        ) from None
    finally:
        thread.call = outer
    return tuple(current)


def _run_reversed(
    call: Call, tape: Tape, steps: Sequence[Step], streams: list[Tensor], kwargs: Arguments
) -> None:
    """Runs steps as a node, from the first that needs a gradient."""
    records: list[Replay] = []
    needs = [stream.requires_grad for stream in streams]
    branches = [step.branch for step in steps]
    group = call.groups.get(call.branches)
    given = modules_among(values_of(kwargs)) if kwargs else ()
    if given or group is None or group.branches != branches or not group.holds():
        # The old one may hold parameters that nobody else has any more.
        call.groups.pop(call.branches, None)
        group = Group(branches, given)
    if group.lasts:
        call.found[call.branches] = group
    call.branches += len(steps)
    seen = Seen(group, kwargs, call.given, streams)
    for step, survey in zip(steps, group.surveys, strict=True):
        replay = Replay(step, survey, seen)
        replay.needs_x = True in map(needs.__getitem__, step.inputs)
        if replay.needs_x or replay.leaves:
            for index in step.writes:
                needs[index] = True
        if tape.records or True in needs:
            records.append(replay)
    if len(records) < len(steps):
        # A frozen prefix needs no gradient, so nothing will ever ask for the streams before it; an
        # input that was kept there is not that of the first step on the tape.
        tape.anchors.clear()
        frozen = steps[: len(steps) - len(records)]
        contained = {survey.modules[0]: survey.contained for survey in group.surveys}
        _run_each(call, frozen, streams, partial(_run_frozen, kwargs, contained))
    if not records:
        return
    changed = list(dict.fromkeys(index for replay in records for index in replay.step.writes))
    # Gradients are found from the last step to the first, and one that several steps share adds up
    # in that order, as it does where activations are stored.
    leaves = [leaf for replay in reversed(records) for leaf in replay.leaves]
    outputs = _StepsNode.apply(call, records, changed, len(streams), *streams, *leaves)
    for index, output in zip(changed, outputs):  # noqa: B905 - a log-determinant may follow
        streams[index] = output
    call.log_dets = _sum_of([*call.log_dets, *outputs[len(changed) :]])


def _run_each(
    call: Call, steps: Sequence[Step], streams: list[Tensor], run: Callable[..., Tensor]
) -> None:
    """Runs steps without a node."""
    count = len(streams)
    for step in steps:
        call.watch.apply(step, partial(run, step), streams)
        call.log_dets = _sum_of([*call.log_dets, *streams[count:]])
        del streams[count:]


def _sum_of(log_dets: Sequence[Tensor]) -> Streams:
    """Adds log-determinants at once, or all of them would be alive until the last."""
    return (sum(log_dets[1:], log_dets[0]),) if log_dets else ()


def _run_frozen(
    kwargs: Arguments, contained: Mapping[nn.Module, bool], step: Step, x: Tensor
) -> Tensor:
    # The branch may make a leaf of it. A copy, because another leaf may share its memory.
    x = x.detach() if contained[step.branch] else x.clone()
    t = run_branch(step.call, x, kwargs)
    if t.requires_grad:
        refuse_foreign_leaves(t, (x,), f"branch {type(step.branch).__name__}", x)
    return t.detach()


def _run_stored(kwargs: Arguments, step: Step, x: Tensor) -> Tensor:
    records = torch.is_grad_enabled()
    if records or not x.requires_grad:
        # The view gathers the branch's gradients of x before they meet the stream's own, as the
        # node does, so that both modes add up in the same order. Without a graph it would say that
        # it requires a gradient, and nothing could be differentiated to it.
        x = _alias(x)
    if step.grid is None or not records:
        return run_branch(step.call, x, kwargs)
    # On a grid so do those of arguments, and of a weight that is used twice if it is cast twice.
    # An alias takes sparse gradients, too.
    views = {id(v): _alias(v) for v in kwargs.values() if _has_views(v)}
    with no_autocast_cache() if torch._C._is_any_autocast_enabled() else nullcontext():
        return run_branch(step.call, x, {n: views.get(id(v), v) for n, v in kwargs.items()})


def _has_views(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and value.layout is torch.strided
        and not value.is_nested
    )


def can_reverse() -> bool:
    """Tells whether nodes of our own can be recorded."""
    # Without grad mode nothing is stored anyway. torch.jit.trace, transforms of torch.func and
    # forward-mode derivatives cannot see through an autograd.Function with a tape.
    return (
        torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and not in_transform()
        and torch.autograd.forward_ad._current_level < 0
    )


def _same_data(a: Tensor, b: Tensor) -> bool:
    # Hooks such as FSDP's hand on an alias that has a node of its own in the graph.
    return a is b or _place_of(a) == _place_of(b)


def _place_of(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()
