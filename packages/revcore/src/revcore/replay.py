"""What a second run of a branch must see again, and must not touch.

Reversing runs every branch twice: once in the forward pass, and once more in the backward pass to
rebuild the graph that is differentiated. The second run has to see what the first one saw (random
state, autocast, training flags, buffers, parameters, strides) and must leave no trace: BatchNorm's
statistics change once per training step, and the global random generators end where they were.

All of this happens for every branch in every step of training, in Python, so what is usual is
looked at quickly (`revcore.survey`) and only what is not is put back piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.utils import parametrize

from revcore.arguments import Arguments, exchange, takes_gradient, tensors_of
from revcore.autocast import Autocast, autocast_as, autocast_now, no_autocast_cache
from revcore.buffers import Buffers, get, notes_of
from revcore.graph import differentiate, warn_of_a_result
from revcore.randomness import NO_STATES, RefuseRandomness, draw_again, get_states
from revcore.remember import Memory, thread
from revcore.step import Pullback
from revcore.survey import ABSENT, Change, Group, Survey, Table, needs_of
from revcore.turns import TURN
from revcore.versions import changed, contents

_CAPTURING = (
    "random numbers in a reversible branch cannot be replayed while a CUDA graph is being captured."
    " Capture without dropout, or store the activations: revcore.set_reversing(model, False)."
)
_OTHER_DRAWS = (
    "a reversible branch drew other random numbers when it was repeated: another thread drew from "
    "the same generator during its forward pass, or the branch behaves differently from call to "
    "call. Draw in that thread from a torch.Generator of its own."
)

_hooks = attrgetter("_backward_hooks")
_buffers = attrgetter("_buffers")
_NOTHING: Mapping[int, Tensor] = {}
_AS_IT_IS = nullcontext()


class Seen:
    """What some branches are made of when they run first, one after the other.

    Args:
        group: The branches.
        kwargs: Extra keyword arguments for them.
        given: The tensors among these, as the call began.

    Attributes:
        given: The same.
        kwargs: The same.
        same: Whether all is as it was, while somebody knows it; None otherwise.
    """

    same: bool | None = None

    def __init__(self, group: Group, kwargs: Arguments, given: Sequence[Tensor]) -> None:
        self._group = group
        self.given = given
        self.kwargs = kwargs
        self._tensors = group.tensors
        if kwargs:
            self._tensors = [*group.tensors, *tensors_of(kwargs)]
        self._contents = contents(self._tensors)

    def look(self) -> bool:
        """Tells whether the modules are as they were.

        Raises:
            RuntimeError: If a parameter or an argument was changed in place.
        """
        now = contents(self._tensors)
        if now != self._contents:
            changes = zip(self._tensors * 2, now, self._contents, strict=True)
            raise changed(self._name(next(tensor for tensor, a, b in changes if a != b)))
        if not self._group.has_its_modules():
            names = " or ".join(sorted({type(branch).__name__ for branch in self._group.branches}))
            raise RuntimeError(
                f"a module inside of {names} was replaced between forward and backward, so a "
                "reversible branch cannot be repeated. Call backward() before replacing it."
            )
        return self._group.is_as_it_was()

    def _name(self, tensor: Tensor) -> str:
        for module in self._group.modules:
            for name, value in module._parameters.items():
                if value is tensor:
                    return f"parameter {name!r} of {type(module).__name__}"
        items = self.kwargs.items()
        names = [n for n, v in items if any(t is tensor for t in tensors_of({n: v}))]
        branches = {type(branch).__name__ for branch in self._group.branches}
        return f"argument {names[0]!r}" if names else f"a tensor of {' or '.join(sorted(branches))}"


class Replay(Memory):
    """The first run of one branch on one input, and the means to repeat it.

    Args:
        call: How the branch is run.
        survey: What the branch is made of now.
        seen: The same, of all branches of its node.
        grid: Number of fractional bits of what it is given; None for any values.

    Attributes:
        seen: See above.
        buffers: How the first run found those that the second must find so, too.
        leaves: The tensors beside the input that the branch must give a gradient.
        needs_x: Whether the branch must give its input one.
    """

    needs_x = False
    _autocast: Autocast = ()
    _before = _after = NO_STATES
    buffers: Buffers | None = None
    _left: Sequence[Tensor] = ()

    def __init__(
        self, call: Callable[..., Tensor], survey: Survey, seen: Seen, grid: int | None = None
    ) -> None:
        self._call, self._survey, self._grid = call, survey, grid
        self.seen = seen
        self._kwargs = kwargs = seen.kwargs
        self._tensors, self._needed, self.leaves = survey.tensors, survey.needed, survey.leaves
        self._plain = survey.plain
        if kwargs:
            self._tensors = list(dict.fromkeys(self._tensors + tensors_of(kwargs)))
            self._needed = needs_of(self._tensors)
            self._plain = False
            self.leaves = [tensor for tensor in self._tensors if tensor.requires_grad]

    def first_run(self, x: Tensor) -> Tensor:
        """Runs the branch as any module is run, and notes what it sees.

        Raises:
            TypeError: If the branch returns anything but a tensor.
            RuntimeError: If the branch changes its input in place, or has lazy parameters.
        """
        if not self._kwargs:
            return self._first_run(x)
        # The branch gets the very objects that it was called with, and may leave something there.
        kwargs = exchange(self._kwargs, _NOTHING)
        t = self._first_run(x)
        self._kwargs, known = kwargs, {*map(id, (*self.seen.given, *kwargs.values()))}
        # What another branch has left there has no gradient now, and would have one if stored.
        left = [v for v in tensors_of(kwargs) if id(v) not in known]
        self._left = [*filter(takes_gradient, left)]
        return t

    def _first_run(self, x: Tensor) -> Tensor:
        survey = self._survey
        if not survey.known:
            # A stand-in, because a hook that a branch sets on its input belongs to the repetition.
            x = x.detach()
        self._stride, self._dtype = x.stride(), x.dtype
        if torch._C._is_any_autocast_enabled():
            self._autocast = autocast_now(survey.kinds(x))
        elif survey.simple and self._grid is None:
            return run_branch(self._call, x, self._kwargs, self)
        if survey.lazy:
            raise RuntimeError(
                f"branch {survey.name} has lazy parameters that have no shape "
                "yet, so it cannot be reversed. Run the net once under torch.no_grad() first."
            )
        with TURN, no_autocast_cache() if self._autocast else _AS_IT_IS:
            modules = [*survey.buffered, *survey.unbuffered]
            before = notes_of(modules) if any(map(_buffers, modules)) else ()
            t = self._draw(x)
            if before or any(map(_buffers, modules)):
                self.buffers = Buffers(modules, before)
            return t

    def _draw(self, x: Tensor) -> Tensor:
        """Runs the branch, and notes the random generators before it and after it."""
        if self._survey.contained:
            return self._without_gradients(run_branch, x)
        devices = self._survey.devices(x)
        self._before = get_states(devices)
        if not self._before:
            with RefuseRandomness(_CAPTURING):
                return self._without_gradients(run_branch, x)
        self.draws = devices
        t = self._without_gradients(run_branch, x)
        self._after = get_states(devices)
        return t

    @property
    def moved(self) -> bool:
        """Whether the first run has drawn random numbers, or changed buffers."""
        drawn = any(a is not b for a, b in zip(self._before, self._after, strict=False))
        return drawn or (self.buffers is not None and self.buffers.have_moved())

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        """Runs the branch again as it ran before, without gradients, leaving no trace.

        Args:
            x: The input of the first run, reconstructed.
            call: What to run instead, with an input of its own: the branch's inverse.

        Raises:
            RuntimeError: If a parameter, buffer or argument has changed since, or the branch draws
                other random numbers than before.
        """
        if call is not None:
            return self._repeat(call, x, self._kwargs, None)
        return self._without_gradients(self._repeat, self._lay_out(x))

    def record(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """Runs the branch like `repeat`, for a graph of its own.

        Args:
            x: The input of the first run, reconstructed.

        Returns:
            The branch's output with its graph, and a function from its gradient to those of `x`,
            None if that is not needed, and of `leaves`.
        """
        x = self._lay_out(x).detach()
        if self.needs_x:
            x.requires_grad_()
        leaves, aliases = self.leaves, _NOTHING
        # The inner differentiation would run a leaf's tensor hooks, and autograd runs them again on
        # what the node returns; a stand-in has none. Nor does it belong to the CUDA stream of the
        # forward pass, which need not be that of the repetition while a graph is captured.
        tensors, needed = self._tensors, self._needed
        everywhere = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if (
            everywhere
            or not self._plain
            or any(map(_hooks, tensors))
            or needs_of(tensors) != needed
        ):
            aliases = {
                id(v): v.detach().requires_grad_(need)
                for v, need in zip(tensors, needed, strict=True)
                if everywhere or v.requires_grad is not need or not v.is_leaf or v._backward_hooks
            }
            leaves = [aliases.get(id(leaf), leaf) for leaf in leaves]
            # Who uses one of these will be told that it gets no gradient.
            aliases |= {id(v): v.detach().requires_grad_() for v in self._left}
        torch._C._set_grad_enabled(True)
        try:
            # What counts modules' gradients (torch's FlopCounterMode) cannot count those of a leaf.
            seen = x.view_as(x) if _global_forward_pre_hooks else x
            t = self._repeat(self._call, seen, self._kwargs, self, aliases)
        finally:
            torch._C._set_grad_enabled(False)
        wanted = (x if self.needs_x else None, *leaves)
        pull = partial(differentiate, t, wanted, self._survey, bool(self._kwargs))
        return t, partial(self._pull, pull, aliases) if self._survey.norms else pull

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a scheme's own arithmetic under the autocast of the first run.

        Raises:
            RuntimeError: If it changes a stream in place, which may be the caller's.
        """
        stream = arguments[0]
        try:
            before = stream._version
        except (AttributeError, RuntimeError):  # no tensor, or an inference tensor
            before = None
        if self._autocast or torch._C._is_any_autocast_enabled():
            kind = next(x.device.type for x in arguments if isinstance(x, Tensor))
            with autocast_as(self._autocast, ("cpu", kind)):
                found = function(*arguments)
        else:
            found = function(*arguments)
        if before is not None and stream._version != before:
            raise RuntimeError(
                f"{getattr(function, '__qualname__', function)} changes its first argument in "
                "place, which may be the output of the chain; let it return a new tensor"
            )
        return found

    def _lay_out(self, x: Tensor) -> Tensor:
        """Copies `x` to the strides and dtype that the branch saw first; others give other bits."""
        if x.stride() == self._stride and x.dtype == self._dtype:
            return x
        like = torch.empty_strided(x.shape, self._stride, dtype=self._dtype, device=x.device)
        return like.copy_(x)

    def _without_gradients(self, run: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Runs the branch; on a grid by the very code that is run with gradients."""
        if self._grid is None:
            return run(self._call, x, self._kwargs, self)
        with torch.enable_grad():
            x = x.detach().requires_grad_(self.needs_x)
            return run(self._call, x, self._kwargs, self).detach()

    def _repeat(
        self,
        call: Callable[..., Tensor],
        x: Tensor,
        kwargs: Arguments,
        memory: Memory | None,
        aliases: Mapping[int, Tensor] = _NOTHING,
    ) -> Tensor:
        self.again = True
        same = self.seen.look() if self.seen.same is None else self.seen.same
        usual = same and not (aliases or self.buffers)
        cast = self._autocast or torch._C._is_any_autocast_enabled()
        if kwargs:
            kwargs = exchange(kwargs, aliases)
        if usual and not self._survey.norms and not self._before and not cast:
            return run_branch(call, x, kwargs, memory)
        run = partial(run_branch, call, x, kwargs, memory)
        if self._before:
            run = partial(draw_again, self._before, self._after, run, _OTHER_DRAWS)
        autocast = autocast_as(self._autocast, self._survey.kinds(x)) if cast else _AS_IT_IS
        with TURN, autocast:
            undo = self._put_back(aliases, usual=usual)
            try:
                t = run()
                for module, name, _ in self.buffers.moved if self.buffers else ():
                    if getattr(get(module._buffers, name), "grad_fn", None) is not None:
                        warn_of_a_result(self._survey.modules[0], name)
                return t
            finally:
                for change in reversed(undo):
                    _swap(*change)

    def _pull(
        self, pull: Pullback, aliases: Mapping[int, Tensor], grad: Tensor
    ) -> Sequence[Tensor | None]:
        """Differentiates; what the branch checkpoints runs once more meanwhile."""
        same = self.seen.look() if self.seen.same is None else self.seen.same
        with TURN:
            undo = self._put_back(aliases, usual=same and not (aliases or self.buffers))
            try:
                return pull(grad)
            finally:
                for change in reversed(undo):
                    _swap(*change)

    def _put_back(self, aliases: Mapping[int, Tensor], *, usual: bool) -> list[Change]:
        """Makes the branch's modules what they were, and returns what they are now."""
        wanted = [] if usual else self._find_changes(aliases)
        wanted += [(m.__dict__, "track_running_stats", False) for m in self._survey.norms]
        return [_swap(*change) for change in wanted]

    def _find_changes(self, aliases: Mapping[int, Tensor]) -> list[Change]:
        """Lists what is another one in the branch's modules now: where, and what was there."""
        wanted = self._survey.find_changes()
        for own, table, found in self._survey.tables:
            for name, value in found.items():
                value = aliases.get(id(value), value)  # noqa: PLW2901
                if get(table, name) is not value:
                    wanted.append((table, name, value))
                if name in own:  # pruned since, say
                    wanted.append((own, name, ABSENT))
        wanted += self.buffers.find_changes() if self.buffers else []
        modules = self._survey.modules
        if wanted and any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            raise RuntimeError(
                f"branch {self._survey.name} has a ScriptModule, in which nothing "
                "can be put back as it was in the forward pass: leave its flags, hooks and "
                "parameters as they are until backward() is done, and its buffers, or store the "
                "activations, revcore.set_reversing(model, False)."
            )
        return wanted


def _swap(table: Table, name: str, value: Any) -> Change:
    """Puts a value where another one, which it returns, is."""
    found = table.get(name, ABSENT)
    if value is ABSENT:
        table.pop(name, None)
    else:
        table[name] = value
    return table, name, found


def run_branch(
    call: Callable[..., Any], x: Tensor, kwargs: Arguments, memory: Memory | None = None
) -> Tensor:
    """Calls a branch, and refuses one whose result could not be reversed.

    Args:
        call: Runs the branch.
        x: Its input.
        kwargs: Its extra arguments.
        memory: What `revcore.remember` in the branch asks; None for that of a branch around it.

    Raises:
        TypeError: If the branch returns anything but a tensor.
        RuntimeError: If the branch changes its input in place.
    """
    counted = not x.is_inference()
    before = x._version if counted else 0
    outer = thread.memory
    if memory is not None:
        memory.outer, memory.position, thread.memory = outer, 0, memory
    # A weight that parametrize.cached() keeps from one run would have no graph in the other. Taken
    # off and added again, because torch counts so, and another thread may do the same meanwhile.
    cached = parametrize._cache_enabled
    parametrize._cache_enabled -= cached
    try:
        t = call(x, **kwargs)
        if memory is not None:
            memory.close()
    finally:
        thread.memory = outer
        parametrize._cache_enabled += cached
    if not isinstance(t, Tensor):
        raise TypeError(f"branch {_name(call)} must return one tensor, got {type(t).__name__}")
    if counted and x._version != before:
        raise RuntimeError(
            f"branch {_name(call)} changes its input in place, which destroys the stream that it "
            "reads. Start the branch with an operation that is not in place, such as "
            "nn.ReLU(inplace=False)."
        )
    return t


def _name(call: Callable[..., Any]) -> str:
    return type(getattr(call, "__self__", call)).__name__
