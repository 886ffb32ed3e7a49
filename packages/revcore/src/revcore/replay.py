"""What a second run of a branch must see again, and must not touch.

Reversing runs every branch twice: once in the forward pass, and once more in the backward pass to
rebuild the graph that is differentiated. The second run has to see what the first one saw (random
state, autocast, training flags, buffers, parameters, strides) and must leave no trace: BatchNorm's
statistics change once per training step, and the global random generators end where they were.

All of this happens for every branch in every step of training, in Python, so what is usual is
looked at quickly (`revcore.survey`) and only what is not is put back piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import _global_forward_pre_hooks

from revcore.arguments import exchange, takes_gradient, tensors_of
from revcore.autocast import Autocast, autocast_as, autocast_now, no_autocast_cache
from revcore.buffers import Copy, copy_all, settle
from revcore.cuda_graphs import are_in_use
from revcore.graph import differentiate, warn_of_a_result
from revcore.randomness import NO_STATES, RefuseRandomness, draw_again, get_states, is_capturing
from revcore.remember import Memory
from revcore.running import run_branch
from revcore.seen import Seen
from revcore.snapshot import Change, Snapshot, fill, left_by, source_of
from revcore.step import Pullback, Step
from revcore.survey import Survey, needs_of
from revcore.turns import TURN
from revcore.versions import changed, version

_CAPTURING = (
    "random numbers in a reversible branch cannot be replayed while a CUDA graph is being captured."
    " Capture without dropout, or store the activations: revcore.set_reversing(model, False)."
)
_OTHER_DRAWS = (
    "a reversible branch drew other random numbers when it was repeated: how many it draws depends "
    "on values, which come back rounded (nn.RReLU, torch.poisson), another thread drew from the "
    "same generator during its forward pass, or the branch behaves differently from call to call. "
    "Values come back exactly with keep_input=True in each block of two branches, or in a chain of "
    'coupling="fixed_point"; a thread may draw from a torch.Generator of its own; or store the '
    "activations: revcore.set_reversing(model, False)."
)
_CUDNN_DRAWS = (
    "branch {} has a recurrent layer with dropout, for which cuDNN draws numbers that nobody "
    "can replay. Give it dropout=0, and put nn.Dropout between layers of one; or run forward and "
    "backward under torch.backends.cudnn.flags(enabled=False); or store the activations: "
    "revcore.set_reversing(model, False)."
)

_GRAPH_DRAWS = (
    "branch {} draws random numbers in a CUDA graph of torch.compile (mode='reduce-overhead' or "
    "'max-autotune'), which are not always those of its state when the graph is recorded, so they "
    "cannot be replayed. Compile it in another mode ('max-autotune-no-cudagraphs') or without "
    "dropout, or store the activations: revcore.set_reversing(model, False)."
)
_OF_NO_GRAPH = (
    "register a hook on a tensor that doesn't require gradient",
    "retain_grad on Tensor that has requires_grad=False",
    "does not require grad and does not have a grad_fn",
)
_NO_GRAPH = (
    "branch {} needs a graph of its own run, but the first run of a reversible chain records none "
    "({}). Register hooks `if tensor.requires_grad:`, and compute derivatives inside of a branch "
    "under torch.enable_grad()."
)

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_set_grad_enabled = torch._C._set_grad_enabled
# Older releases of torch do not tell.
_hooks_on_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_NOTHING: Mapping[int, Tensor] = {}
_NO_CHANGES: list[Change] = []
_AS_IT_IS = nullcontext()
_alias = torch.ops.aten.alias


def _saving_nothing_elsewhere() -> AbstractContextManager[None]:
    """Replaces hooks on saved tensors: nothing frees what they pack for a graph that is dropped."""
    return saved_tensors_hooks(Tensor.detach, _itself) if _hooks_on_saved(True) else _AS_IT_IS


def _itself(x: Tensor) -> Tensor:
    return x


def _refuse_computed(modules: Sequence[Any]) -> None:
    """Raises if an inverse may read what hooks compute in the forward pass, without a graph."""
    for module in modules:
        for name, value in vars(module).items():
            source = source_of(module, name) if isinstance(value, Tensor) else None
            if source is not None and module._parameters[source].requires_grad:
                raise RuntimeError(
                    f"the inverse of a reversible chain would give {source!r} of "
                    f"{type(module).__name__} no gradient: {name!r} is computed from it in the "
                    "forward pass alone, by a hook of torch.nn.utils (weight_norm, prune). Use "
                    "torch.nn.utils.parametrizations, or store the activations: "
                    "revcore.set_reversing(model, False)."
                )


class Replay(Memory):
    """The first run of one branch on one input, and the means to repeat it.

    Args:
        step: The step that runs the branch.
        survey: What the branch is made of now.
        seen: The same, of all branches of its node.

    Attributes:
        step: See above.
        seen: See above.
        leaves: The tensors beside the input that the branch must give a gradient.
        needs_x: Whether the branch must give its input one.
    """

    needs_x = False
    _placements: Any = None
    _autocast: Autocast = ()
    _before = _after = NO_STATES
    # Buffers that the first run may have changed, and those that it has not.
    _copies: Sequence[Copy] = ()
    _still: Sequence[Copy] = ()
    # What an inverse must find, if that is asked.
    _end: Snapshot | None = None
    _left: Sequence[Tensor] = ()

    def __init__(self, step: Step, survey: Survey, seen: Seen) -> None:
        self.step, self._survey, self.seen = step, survey, seen
        self._kwargs = kwargs = seen.kwargs
        self._tensors, self._needed, self.leaves = survey.tensors, survey.needed, survey.leaves
        self._plain = survey.plain
        self._quick = seen.quick and survey.simple and step.grid is None
        self._shared = survey.snapshot
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
        self._stride, self._dtype = x.stride(), x.dtype
        if self.seen.draws:  # as all do whose streams are of a class of their own, like DTensors
            self._placements = getattr(x, "placements", None)
        if self._quick:
            if not (self._survey.draws or self.seen.draws):
                return self._run(x)
            with TURN:
                return self._draw(x)
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
        if not survey.contained:
            # A stand-in, because a hook that a branch sets on its input belongs to the repetition.
            x = x.detach()
        if _is_any_autocast_enabled():
            self._autocast = autocast_now(survey.kinds(x))
        if survey.lazy:
            raise RuntimeError(
                f"branch {survey.name} has lazy parameters that have no shape "
                "yet, so it cannot be reversed. Run the net once under torch.no_grad() first."
            )
        if survey.cudnn_draws and x.is_cuda and torch.backends.cudnn.enabled:
            raise RuntimeError(_CUDNN_DRAWS.format(survey.name))
        if self.step.inverted and not self.step.repeats:
            _refuse_computed(survey.modules)
        with TURN, no_autocast_cache() if self._autocast else _AS_IT_IS:
            # Another branch of the node may have changed something of a module that they share.
            if self.seen.ran and not survey.snapshot.holds():
                self._survey = survey = Survey(survey.modules[0], survey.given)
            self.seen.ran = True
            copies = copy_all(survey.buffers)
            try:
                t = self._draw(x)
            except RuntimeError as error:
                if not any(text in str(error) for text in _OF_NO_GRAPH):
                    raise
                raise RuntimeError(_NO_GRAPH.format(survey.name, error)) from error
            self._copies = copies
            if not survey.settled:
                self._copies, self._still = settle(copies)
            return t

    def _draw(self, x: Tensor) -> Tensor:
        """Runs the branch, and notes the random generators before it and after it."""
        if not (self._survey.draws or self.seen.draws):
            return self._without_gradients(self._run, x)
        devices = self._survey.devices(x)
        self._before = get_states(devices)
        if not self._before:
            with RefuseRandomness(_CAPTURING):
                return self._without_gradients(self._run, x)
        self.draws = devices
        t = self._without_gradients(self._run, x)
        self._after = get_states(devices)
        if are_in_use() and self._survey.runs_cuda_graphs:
            pairs = zip(self._before, self._after, strict=True)
            if any(a is not b and a.device.type == "cuda" for a, b in pairs):
                raise RuntimeError(_GRAPH_DRAWS.format(self._survey.name))
        return t

    def end(self) -> bool:
        """Notes how the first run has left the modules, for an inverse that may have to know.

        Returns:
            Whether it has drawn random numbers or changed buffers, for which it waits for the
            device, or had hooks, which may have changed its input or output.
        """
        self._end = Snapshot(self._survey.modules)
        module = self._survey.modules[0]
        return (
            bool(module._forward_hooks or module._forward_pre_hooks)
            or any(a is not b for a, b in zip(self._before, self._after, strict=False))
            or any(copy.has_moved() for copy in self._copies)
            or self._survey.snapshot.buffers_are_others()
        )

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        """Runs the branch again as it ran before, without gradients, leaving no trace.

        Args:
            x: The input of the first run, reconstructed.
            call: What to run instead, with an input of its own: the branch's inverse.

        Raises:
            RuntimeError: If a parameter, buffer or argument has changed since, or the branch draws
                other random numbers than before.
        """
        clones = self._clones()
        if call is not None:
            t = self._repeat(x, clones, [], call)
            # That way may change what the first run did not.
            self.seen.look()
            for buffer, flag, _, copy in self._copies:
                number = buffer.is_floating_point()  # and no counter
                if number and Copy(clones[id(buffer)], flag, 0, copy).has_moved():
                    raise RuntimeError(
                        f"{self.seen.name(buffer)} is changed by the way back alone, which may "
                        "therefore not undo the other way. Use evaluation mode, or store the "
                        "activations: revcore.set_reversing(model, False)"
                    )
            return t
        again = partial(self._repeat, aliases=clones, left=[])
        return self._without_gradients(again, self._lay_out(x))

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
        elif not self._survey.contained:
            x = x.clone()  # as in a frozen step
        survey, aliases, views, left = self._survey, _NOTHING, _NOTHING, _NO_CHANGES
        quick = self._quick and self.seen.usual
        if not (self._plain and self.seen.usual):
            aliases = self._stand_ins(x)
        _set_grad_enabled(True)
        try:
            if quick and survey.repeats_simply and not self.seen.draws:
                self.again = True
                t = self._run(x)
            elif quick:
                self.again = True
                with TURN, survey.untracked:
                    t = self._draw_again(self._run, x)
            else:
                view, views, left = x, {**aliases, **self._clones()}, []
                if _global_forward_pre_hooks:
                    # What counts modules' gradients (torch's FlopCounterMode) can count no leaf's.
                    view = _alias(x)
                    views |= {key: _alias(leaf) for key, leaf in aliases.items()}
                t = self._repeat(view, views, left)
        finally:
            _set_grad_enabled(False)
        leaves = [aliases.get(id(leaf), leaf) for leaf in self.leaves] if aliases else self.leaves
        pull = partial(differentiate, t, (x, *leaves), survey, bool(self._kwargs))
        if left or self._copies:
            clones = [(each, views[id(each.buffer)]) for each in self._copies]
            own = [(each, clone, version(clone)) for each, clone in clones]
            pull = partial(self._pull, pull, left, own)
        return t, pull

    def parameters(self) -> tuple[str, Sequence[Tensor]]:
        """Returns the name of the branch's class, and its parameters."""
        return self._survey.name, self._survey.tensors

    def _clones(self) -> dict[int, Tensor]:
        """Copies what the first run found in buffers, by their `id`.

        Copies of copies, because a graph that is retained may be run backward again.
        """
        return {id(buffer): copy.clone() for buffer, *_, copy in self._copies}

    def _stand_ins(self, x: Tensor) -> Mapping[int, Tensor]:
        """Creates what takes the place of parameters and arguments in a repetition, by `id`.

        The inner differentiation would run a leaf's tensor hooks, and autograd runs them again on
        what the node returns; a stand-in has none. Nor does it belong to the CUDA stream of the
        forward pass, which need not be that of the repetition while a graph is captured.
        """
        everywhere = is_capturing(x.device) or bool(_global_forward_pre_hooks)
        others = {
            id(v): v.detach().requires_grad_(need)
            for v, need in zip(self._tensors, self._needed, strict=True)
            if everywhere or v.requires_grad is not need or not v.is_leaf or v._backward_hooks
        }
        # Who uses one of these will be told that it gets no gradient.
        return others | {id(v): v.detach().requires_grad_() for v in self._left}

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a scheme's own arithmetic under the autocast of the first run.

        Raises:
            RuntimeError: If it changes a stream in place, which may be the caller's.
        """
        # What version() and a context of nothing would take shows: this is called twice a branch.
        stream: Tensor = arguments[0]
        before = None if stream.is_inference() else stream._version
        if self._autocast or _is_any_autocast_enabled():
            with autocast_as(self._autocast, ("cpu", stream.device.type)):
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
        """Copies `x` to the strides and dtype that the branch saw first; others give other bits.

        A branch may also look at what its process has of a DTensor.
        """
        if self._placements is not None:
            x = x.redistribute(placements=self._placements)  # type: ignore[attr-defined]
        if x.stride() == self._stride and x.dtype == self._dtype:
            return x
        return x.new_empty_strided(x.shape, self._stride, dtype=self._dtype).copy_(x)

    def _run(self, x: Tensor) -> Tensor:
        memory = self if self._survey.remembers else None
        return run_branch(self.step.call, x, self._kwargs, memory)

    def _without_gradients(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs the branch; on a grid by the very code that is run with gradients."""
        if self.step.grid is None:
            return run(x)
        with torch.enable_grad(), _saving_nothing_elsewhere():
            t = run(x.detach().requires_grad_(self.needs_x)).detach()
        for _, table, name in () if self._survey.contained else self._survey.snapshot.new_results():
            table[name] = table[name].detach()  # or the graph would stay alive
        return t

    def _repeat(
        self,
        x: Tensor,
        aliases: Mapping[int, Tensor],
        left: list[Change],
        inverse: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        self.again, self.lends = True, bool(aliases)
        kwargs = exchange(self._kwargs, aliases)
        run: tuple[Any, ...] = (self.step.call, x, kwargs, self)
        survey, snapshot = self._survey, self._survey.snapshot
        if inverse is not None and self._end is not None:
            run, snapshot = (inverse, x, kwargs, Memory()), self._end
        same = self.seen.look() if self.seen.same is None else self.seen.same
        if snapshot is not self._shared:
            same = snapshot.holds()
        cast = self._autocast or _is_any_autocast_enabled()
        if same and survey.repeats_simply and not (aliases or cast or self.seen.draws):
            return run_branch(*run)
        autocast = autocast_as(self._autocast, survey.kinds(x)) if cast else _AS_IT_IS
        changes = not (same and survey.contained) or aliases or survey.norms
        as_it_was = self._as_it_was(snapshot, aliases, left, same=same) if changes else _AS_IT_IS
        with TURN, autocast, as_it_was:
            return self._draw_again(run_branch, *run)

    def _draw_again(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Runs something with the random numbers of the first run, if that has drawn some."""
        if not self._before:
            return run(*arguments)
        return draw_again(self._before, self._after, partial(run, *arguments), _OTHER_DRAWS)

    def _pull(
        self, pull: Pullback, left: list[Change], own: list[tuple[Copy, Tensor, int]], grad: Tensor
    ) -> Sequence[Tensor | None]:
        """Differentiates; hooks find what the run has left, and what they leave stays."""
        with left_by(left) if left else _AS_IT_IS:
            found = pull(grad)
        for each, clone, count in own:
            if version(clone) != count:
                if each.has_moved():
                    raise RuntimeError(
                        f"{self.seen.name(each.buffer)} is changed in the backward pass of a "
                        "branch, and was changed since its forward pass began: there, by another "
                        "call or by another backward pass. Let passes have buffers of their own "
                        "and differentiate each call once, or store the activations: "
                        "revcore.set_reversing(model, False)"
                    )
                each.buffer.copy_(clone)
        return found

    @contextmanager
    def _as_it_was(
        self, snapshot: Snapshot, aliases: Mapping[int, Tensor], left: list[Change], *, same: bool
    ) -> Iterator[None]:
        """Lets the branch's modules hold what they held, but for `aliases`.

        What they hold in the end beside that is added to `left`.
        """
        survey = self._survey
        for buffer, _, count, _ in self._still:
            if version(buffer) != count:
                raise changed(self.seen.name(buffer))
        loan = snapshot.lend(aliases) if same else None
        others = snapshot.put_back(aliases) if loan is None else []
        try:
            with survey.untracked:
                yield
        finally:
            # The first run may have left all as it was, where this one has left something.
            there = loan is not None and loan.give_back()
            if there and (survey.contained or snapshot.holds()):
                results = []
            else:
                results = snapshot.new_results()
                left += snapshot.changes(_NOTHING if there else aliases)
                fill(others)
                if same:
                    snapshot.put_back(_NOTHING)
        for module, _, name in results:
            warn_of_a_result(survey.modules[0], module, name)
