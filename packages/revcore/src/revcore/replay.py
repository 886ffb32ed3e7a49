"""What a second run of a branch must see again, and must not touch.

Reversing runs every branch twice: once in the forward pass, and once more in the backward pass to
rebuild the graph that is differentiated. The second run has to see what the first one saw (random
state, autocast, training flags, buffers, parameters, strides) and must leave no trace: BatchNorm's
statistics change once per training step, and the global random generators end where they were.

All of this happens for every branch in every step of training, in Python, so what is usual is
looked at quickly (`Replay._is_usual`) and only what is not is put back piece by piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from revcore.autocast import autocast_as, autocast_now
from revcore.graph import Graph
from revcore.randomness import NO_STATES, RefuseRandomness, draw_again, draw_nothing, get_states
from revcore.remember import Memory
from revcore.versions import changed, version, versions

# These read their running statistics only in evaluation, so switching `track_running_stats` off
# repeats a training-mode run exactly and is cheaper than exchanging buffers. Subclasses may use
# their buffers in other ways and take the general path.
BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}

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

_Table = dict[str, Any]
_Undo = list[tuple[_Table, str, Any]]


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
        same_graph: bool = False,
    ) -> None:
        self.branch = branch
        self._call = call
        self._kwargs = kwargs
        self._same_graph = same_graph
        # Modules and parameters are read at call time, because a module may hold others at another
        # call (torch.func.functional_call, FSDP). nn.Module.modules takes four times as long.
        modules: list[Any] = [branch]
        for module in modules:  # grows meanwhile
            if module._modules:
                modules += module._modules.values()
        if None in modules or len(set(modules)) < len(modules):
            modules = [module for module in dict.fromkeys(modules) if module is not None]
        self._modules = modules
        self._training = [module.training for module in modules]
        self._tables: list[tuple[_Table, _Table]] = [
            (m._parameters, dict(m._parameters)) for m in modules if m._parameters
        ]
        leaves: list[Tensor] = [
            v for _, found in self._tables for v in found.values() if v is not None
        ]
        if len(set(map(id, leaves))) < len(leaves):
            leaves = list({id(value): value for value in leaves}.values())
        self._buffered = [module for module in modules if module._buffers]
        self._norms: list[nn.Module] = []
        if self._buffered:
            norms = [m for m in self._buffered if m.training and type(m) in BATCH_NORMS]
            self._norms = [module for module in norms if module.track_running_stats]
            self._buffered = [module for module in self._buffered if module not in norms]
        self._quiet = draw_nothing(modules)
        self._arguments: dict[str, Tensor] = {}
        if kwargs:
            self._arguments = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
            known = set(map(id, leaves))
            extra = {id(v): v for v in self._arguments.values() if v.requires_grad}
            leaves += [value for key, value in extra.items() if key not in known]
        self.leaves = leaves
        self._versions = versions(leaves)
        self._argument_versions = versions(self._arguments.values())

    def first_run(self, x: Tensor) -> Tensor:
        """Runs the branch as any module is run, and notes what it sees.

        Raises:
            TypeError: If the branch returns anything but a tensor.
            RuntimeError: If the branch changes its input in place.
        """
        self._stride = x.stride()
        self._memory = Memory()
        self._needs_x = x.requires_grad
        self._device = x.device
        self._before = self._after = NO_STATES
        self._autocast = () if _no_autocast() else autocast_now(self._device.type)
        self._buffers, self._copies = [], []
        guarded = self._autocast or self._same_graph
        if self._quiet and not self._buffered and not guarded:
            return self._run(self._call, x, self._kwargs)
        with _LOCK:
            if not self._quiet:
                self._before = get_states(x)
            if not self._buffered and self._before and not guarded:
                t = self._run(self._call, x, self._kwargs)
                self._after = get_states(x)
                return t
            buffers = [
                (module, module._buffers, name, value, version(value))
                for module in self._buffered
                for name, value in module._buffers.items()
                if value is not None
            ]
            copies = [value.clone() for _, _, _, value, _ in buffers]
            capturing = not self._quiet and not self._before
            if guarded or capturing:
                t = self._guarded_run(x, capturing=capturing)
            else:
                t = self._run(self._call, x, self._kwargs)
            if self._before:
                self._after = get_states(x)
            # A copy is kept of the few buffers that the branch has changed, to run it from there.
            moved = [
                table.get(name) is not value or version(value) != count
                for _, table, name, value, count in buffers
            ]
            self._buffers = [b for b, m in zip(buffers, moved, strict=True) if not m]
            self._copies = [
                (table, name, copy)
                for (_, table, name, _, _), copy, m in zip(buffers, copies, moved, strict=True)
                if m
            ]
        return t

    def _guarded_run(self, x: Tensor, *, capturing: bool) -> Tensor:
        with ExitStack() as stack:
            if self._autocast:
                stack.enter_context(autocast_as(self._autocast, self._device.type))
            if capturing:
                stack.enter_context(RefuseRandomness(_CAPTURING))
            stack.enter_context(torch.set_grad_enabled(self._same_graph))
            x = x.detach().requires_grad_(self._needs_x and self._same_graph)
            return self._run(self._call, x, self._kwargs).detach()

    def _run(self, call: Callable[..., Tensor], x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        if call is not self._call:
            return run_branch(call, x, kwargs)
        with self._memory:
            return run_branch(call, x, kwargs)

    def _lay_out(self, x: Tensor) -> Tensor:
        """Copies `x` to the strides that the branch saw first; other strides, other bits."""
        like = torch.empty_strided(x.shape, self._stride, dtype=x.dtype, device=x.device)
        return like.copy_(x)

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        """Runs the branch again as it ran before, without gradients, leaving no trace.

        Args:
            x: The input of the first run, reconstructed.
            call: What to run instead, with an input of its own: the branch's inverse.

        Raises:
            RuntimeError: If a parameter, buffer or argument has changed since, or the branch draws
                other random numbers than before.
        """
        self._memory.again = True
        if call is not None:
            return self._repeat(call, x, _NOTHING)
        x = x if x.stride() == self._stride else self._lay_out(x)
        if not self._same_graph:
            return self._repeat(self._call, x, _NOTHING)
        with torch.enable_grad():
            x = x.detach().requires_grad_(self._needs_x)
            return self._repeat(self._call, x, _NOTHING).detach()

    def repeat_for_gradients(self, x: Tensor, *, needs_x: bool) -> Graph:
        """Runs the branch like `repeat`, for a graph of its own.

        Args:
            x: The input of the first run, reconstructed.
            needs_x: Whether its gradient is needed.

        Returns:
            The branch's output and its graph, whose leaves are what stands for `x`, then one tensor
            for each of `leaves`.
        """
        self._memory.again = True
        x = (x if x.stride() == self._stride else self._lay_out(x)).detach()
        if needs_x:
            x.requires_grad_()
        # The inner differentiation would run a leaf's tensor hooks, and autograd runs them again on
        # what the node returns; a stand-in has none.
        leaves, aliases = self.leaves, _NOTHING
        hooked = [leaf for leaf in leaves if leaf._backward_hooks or not leaf.is_leaf]
        if hooked:
            aliases = {id(v): v.detach().requires_grad_(v.requires_grad) for v in hooked}
            leaves = [aliases.get(id(leaf), leaf) for leaf in leaves]
        with torch.enable_grad():
            first = torch._C._autograd._get_sequence_nr()
            t = self._repeat(self._call, x, aliases)
            nodes = torch._C._autograd._get_sequence_nr() - first
        # Arguments may hold other tensors at each call.
        return Graph(t, [x, *leaves], None if self._kwargs else nodes)

    def _repeat(
        self, call: Callable[..., Tensor], x: Tensor, aliases: Mapping[int, Tensor]
    ) -> Tensor:
        self._refuse_changes()
        if not aliases and self._is_usual():
            if not self._norms and not self._before:
                return self._run(call, x, self._kwargs)
            with _LOCK:
                try:
                    for module in self._norms:
                        # nn.Module.__setattr__ takes microseconds.
                        module.__dict__["track_running_stats"] = False
                    return self._draw_again(call, x, self._kwargs)
                finally:
                    for module in self._norms:
                        module.__dict__["track_running_stats"] = True
        kwargs = {name: aliases.get(id(value), value) for name, value in self._kwargs.items()}
        undo: _Undo = []
        with _LOCK, ExitStack() as stack:
            stack.callback(_take_back, undo)
            self._put_back(aliases, undo)
            stack.enter_context(autocast_as(self._autocast, self._device.type))
            return self._draw_again(call, x, kwargs)

    def _draw_again(
        self, call: Callable[..., Tensor], x: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        if not self._before:
            return self._run(call, x, kwargs)
        return draw_again(
            self._before, self._after, lambda: self._run(call, x, kwargs), _OTHER_DRAWS
        )

    def _is_usual(self) -> bool:
        """Tells whether there is nothing to put back but generators and batch norms' statistics."""
        if self._buffers or self._copies or self._autocast or not _no_autocast():
            return False
        if [module.training for module in self._modules] != self._training:
            return False
        for table, found in self._tables:
            if len(table) != len(found) or not all(map(is_, table.values(), found.values())):
                return False
        return True

    def _refuse_changes(self) -> None:
        """Raises if a parameter, a buffer or an argument was changed in place."""
        if versions(self.leaves) != self._versions:
            for leaf, count in zip(self.leaves, self._versions, strict=True):
                if version(leaf) != count:
                    raise changed(self._name(leaf))
        if self._arguments:
            for (name, value), count in zip(
                self._arguments.items(), self._argument_versions, strict=True
            ):
                if version(value) != count:
                    raise changed(f"argument {name!r}")
        for module, _, name, value, count in self._buffers:
            if version(value) != count:
                raise changed(f"buffer {name!r} of {type(module).__name__}")

    def _name(self, leaf: Tensor) -> str:
        for table, found in self._tables:
            for name, value in found.items():
                if value is leaf:
                    owner = next(type(m).__name__ for m in self._modules if m._parameters is table)
                    return f"parameter {name!r} of {owner}"
        return f"an argument of {type(self.branch).__name__}"

    def _put_back(self, aliases: Mapping[int, Tensor], undo: _Undo) -> None:
        """Makes the branch's modules what they were; `undo` gets what they are now."""
        for module, flag in zip(self._modules, self._training, strict=True):
            if module.training is not flag:
                _swap(module.__dict__, "training", flag, undo)
        for module in self._norms:
            _swap(module.__dict__, "track_running_stats", False, undo)
        for table, found in self._tables:
            for name, value in found.items():
                wanted = aliases.get(id(value), value)
                if table.get(name) is not wanted:
                    _swap(table, name, wanted, undo)
        for _, table, name, value, _ in self._buffers:
            if table.get(name) is not value:
                _swap(table, name, value, undo)
        for table, name, copy in self._copies:
            # A clone, because a graph that is retained may be run backward again.
            _swap(table, name, copy.clone(), undo)


_ABSENT = object()
_NOTHING: Mapping[int, Tensor] = {}


def _swap(table: _Table, name: str, value: Any, undo: _Undo) -> None:
    undo.append((table, name, table.get(name, _ABSENT)))
    table[name] = value


def _take_back(undo: _Undo) -> None:
    for table, name, value in reversed(undo):
        if value is _ABSENT:
            table.pop(name, None)
        else:
            table[name] = value


def _no_autocast() -> bool:
    return not torch._C._is_any_autocast_enabled()


def run_branch(call: Callable[..., Any], x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Calls a branch, and refuses one whose result could not be reversed.

    Raises:
        TypeError: If the branch returns anything but a tensor.
        RuntimeError: If the branch changes its input in place.
    """
    counted = not x.is_inference()
    before = x._version if counted else 0
    t = call(x, **kwargs)
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
