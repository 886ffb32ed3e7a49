"""What a second run of a branch must see again, and must not touch.

Reversing runs every branch twice: once in the forward pass, and once more in the backward pass to
rebuild the graph that is differentiated. The second run has to see what the first one saw (random
state, autocast, training flags, buffers, parameters, strides) and must leave no trace: BatchNorm's
statistics change once per training step, and the global random generators end where they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revcore.autocast import autocast_as, autocast_now
from revcore.randomness import (
    OtherDrawsError,
    RefuseRandomness,
    draw_again,
    draws_since,
    get_states,
    is_capturing,
)
from revcore.slots import Slots, changed, version

# These read their running statistics only in evaluation, so switching `track_running_stats` off
# repeats a training-mode run exactly and is cheaper than exchanging buffers. Subclasses may use
# their buffers in other ways and take the general path.
_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}

# Random generators, buffers and training flags belong to the process or to the module, not to a
# call, so only one thread at a time may run a branch for the first time or repeat it.
_LOCK = threading.RLock()

_CAPTURING = (
    "random numbers in a reversible branch cannot be replayed while a CUDA graph is being captured."
    " Capture without dropout, or store the activations: revcore.set_reversing(model, False)."
)
_OTHER_DRAWS = (
    "a reversible branch drew other random numbers when it was repeated: another thread drew from "
    "the same generator during its forward pass, or the branch behaves differently from call to "
    "call. Draw in that thread from a torch.Generator of its own."
)


class Replay:
    """The first run of one branch on one input, and the means to repeat it.

    Args:
        branch: The module that is run.
        call: How it is run: the module itself, or a method of it.
        kwargs: Extra keyword arguments for it.
        same_graph: Whether also those runs that need no gradients should be made with gradients
            on, because compiled code may compute other bits without.

    Attributes:
        leaves: The tensors beside the input that the branch may need a gradient for.
    """

    def __init__(
        self,
        branch: nn.Module,
        call: Callable[..., Tensor],
        kwargs: Mapping[str, Any],
        *,
        same_graph: bool = False,
    ) -> None:
        self.branch = branch
        self._same_graph = same_graph
        self._call = call
        # Modules and parameters are read at call time, because a module may hold others at another
        # call (torch.func.functional_call, FSDP).
        self._modules = _modules_of(branch)
        self._parameters = Slots("parameter", self._modules)
        self.leaves = self._parameters.values
        if len(set(map(id, self.leaves))) < len(self.leaves):
            self.leaves = list({id(value): value for value in self.leaves}.values())
        self._kwargs = kwargs
        self._versions: dict[str, int] = {}
        if kwargs:
            self._note_arguments(kwargs)

    def _note_arguments(self, kwargs: Mapping[str, Any]) -> None:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        self._versions = {name: version(value) for name, value in tensors.items()}
        known = {id(leaf) for leaf in self.leaves}
        extra = {id(value): value for value in tensors.values() if value.requires_grad}
        self.leaves = self.leaves + [value for key, value in extra.items() if key not in known]

    def first_run(self, x: Tensor) -> Tensor:
        """Runs the branch as any module is run, and notes what it sees.

        Raises:
            TypeError: If the branch returns anything but a tensor.
            RuntimeError: If the branch changes its input in place.
        """
        self._stride = x.stride()
        self._needs_x = x.requires_grad
        self._device_type = x.device.type
        self._training = [module.training for module in self._modules]
        self._autocast = autocast_now(self._device_type)
        buffered = [
            module
            for module in self._modules
            if module._buffers and not (module.training and type(module) in _BATCH_NORMS)
        ]
        with _LOCK:
            buffers = Slots("buffer", buffered)
            copies = [value.clone() for value in buffers.values]
            states = get_states(x.device)
            if self._autocast or self._same_graph or not states:
                t = self._guarded_run(x)
            else:
                t = run_branch(self._call, x, self._kwargs)
            self._draws = draws_since(states)
            # A copy is kept of the few buffers that the branch has changed, to run it from there.
            self._buffers, changed_ones = buffers.split_changed() if buffered else (buffers, [])
            self._copies = [(buffers, position, copies[position]) for position in changed_ones]
        return t

    def _guarded_run(self, x: Tensor) -> Tensor:
        with ExitStack() as stack:
            if self._autocast:
                stack.enter_context(autocast_as(self._autocast, self._device_type))
            if is_capturing(x.device):  # so there are no states
                stack.enter_context(RefuseRandomness(_CAPTURING))
            stack.enter_context(torch.set_grad_enabled(self._same_graph))
            x = x.detach().requires_grad_(self._needs_x and self._same_graph)
            return run_branch(self._call, x, self._kwargs).detach()

    def _lay_out(self, x: Tensor) -> Tensor:
        """Returns `x` with the strides that the branch saw first; other strides, other bits."""
        if x.stride() == self._stride:
            return x
        return torch.empty_strided(x.shape, self._stride, dtype=x.dtype, device=x.device).copy_(x)

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
            return self._repeat(call, x, {})
        x = self._lay_out(x)
        if not self._same_graph:
            return self._repeat(self._call, x, {})
        with torch.enable_grad():
            x = x.detach().requires_grad_(self._needs_x)
            return self._repeat(self._call, x, {}).detach()

    def repeat_for_gradients(self, x: Tensor, *, needs_x: bool) -> tuple[list[Tensor], Tensor]:
        """Runs the branch like `repeat`, for a graph of its own.

        Args:
            x: The input of the first run, reconstructed.
            needs_x: Whether its gradient is needed.

        Returns:
            The leaves of the graph (what stands for `x`, then one tensor for each of `leaves`), and
            the branch's output.
        """
        x = self._lay_out(x).detach().requires_grad_(needs_x)
        # The inner differentiation would run a leaf's tensor hooks, and autograd runs them again
        # on what the node returns; a stand-in has none.
        aliases = {
            id(leaf): leaf.detach().requires_grad_(leaf.requires_grad)
            for leaf in self.leaves
            if leaf._backward_hooks or not leaf.is_leaf
        }
        with torch.enable_grad():
            t = self._repeat(self._call, x, aliases)
        if aliases:
            return [x, *(aliases.get(id(leaf), leaf) for leaf in self.leaves)], t
        return [x, *self.leaves], t

    def _repeat(
        self, call: Callable[..., Tensor], x: Tensor, aliases: Mapping[int, Tensor]
    ) -> Tensor:
        kwargs = self._kwargs
        for name, count in self._versions.items():
            if version(kwargs[name]) != count:
                raise changed(f"argument {name!r}")
        if aliases:
            kwargs = {name: aliases.get(id(value), value) for name, value in kwargs.items()}
        with _LOCK:
            undo: list[Callable[[], object]] = []
            try:
                self._restore_flags(undo)
                self._parameters.restore(aliases, undo)
                self._buffers.restore({}, undo)
                for buffers, position, copy in self._copies:
                    # A clone, because a graph that is retained may be run backward again.
                    buffers.replace(position, copy.clone(), undo)
                return self._run_again(call, x, kwargs)
            finally:
                for step in reversed(undo):
                    step()

    def _run_again(
        self, call: Callable[..., Tensor], x: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        if self._autocast or autocast_now(self._device_type):
            with autocast_as(self._autocast, self._device_type):
                return self._draw_again(call, x, kwargs)
        return self._draw_again(call, x, kwargs)

    def _draw_again(
        self, call: Callable[..., Tensor], x: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        if not self._draws:
            return run_branch(call, x.view_as(x), kwargs)
        try:
            with draw_again(self._draws):
                return run_branch(call, x.view_as(x), kwargs)
        except OtherDrawsError:
            # The draws may have been another thread's, which is no harm if these are all.
            with RefuseRandomness(_OTHER_DRAWS):
                return run_branch(call, x.view_as(x), kwargs)

    def _restore_flags(self, undo: list[Callable[[], object]]) -> None:
        for module, flag in zip(self._modules, self._training, strict=True):
            if module.training != flag:
                undo.append(partial(setattr, module, "training", module.training))
                module.training = flag
            if flag and type(module) in _BATCH_NORMS and module.track_running_stats:
                # Through __dict__, because nn.Module.__setattr__ takes microseconds.
                undo.append(partial(module.__dict__.__setitem__, "track_running_stats", True))
                module.__dict__["track_running_stats"] = False


def run_branch(call: Callable[..., Any], x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Calls a branch, and refuses one whose result could not be reversed.

    Raises:
        TypeError: If the branch returns anything but a tensor.
        RuntimeError: If the branch changes its input in place.
    """
    before = version(x)
    t = call(x, **kwargs)
    if not isinstance(t, Tensor):
        raise TypeError(f"branch {_name(call)} must return one tensor, got {type(t).__name__}")
    if version(x) != before:
        raise RuntimeError(
            f"branch {_name(call)} changes its input in place, which destroys the stream that it "
            "reads. Start the branch with an operation that is not in place, such as "
            "nn.ReLU(inplace=False)."
        )
    return t


def _name(call: Callable[..., Any]) -> str:
    return type(getattr(call, "__self__", call)).__name__


def _modules_of(branch: nn.Module) -> list[nn.Module]:
    # nn.Module.modules would do, but it builds names too and takes four times as long, for every
    # step of every pass.
    found: dict[nn.Module, None] = {}
    stack = [branch]
    while stack:
        module = stack.pop()
        if module not in found:
            found[module] = None
            children = module._modules
            if children:
                stack.extend(child for child in children.values() if child is not None)
    return list(found)
