"""What a second run of a branch must see again, and must not touch.

Reversing runs every branch twice: once in the forward pass, and once more in the backward pass to
rebuild the graph that is differentiated. The second run has to see what the first one saw (random
state, autocast, training flags, buffers, parameters, strides) and must leave no trace: BatchNorm's
statistics change once per training step, and the global random generators end where they were.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

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

# These read their running statistics only in evaluation, so switching `track_running_stats` off
# repeats a training-mode run exactly and is cheaper than exchanging buffers. Subclasses may use
# their buffers in other ways and take the general path.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

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


class _Slot(NamedTuple):
    """A parameter or buffer, and the place in a module that holds it.

    Attributes:
        table: The owner's dictionary of parameters or buffers.
        name: Key in the table.
        value: The tensor.
        version: How often it had been changed in place.
        kind: "parameter" or "buffer", for errors.
        owner: The module that holds it, for errors.
    """

    table: dict[str, Tensor | None]
    name: str
    value: Tensor
    version: int
    kind: str
    owner: nn.Module

    def check(self) -> None:
        if version(self.value) != self.version:
            raise _changed(f"{self.kind} {self.name!r} of {type(self.owner).__name__}")

    def swap(self, value: Tensor, stack: ExitStack) -> None:
        """Puts another tensor into the place until the stack is closed."""
        if self.name in self.table:
            stack.callback(self.table.__setitem__, self.name, self.table[self.name])
        else:
            stack.callback(self.table.pop, self.name, None)
        self.table[self.name] = value


class Replay:
    """The first run of one branch on one input, and the means to repeat it.

    Args:
        branch: The module that is run.
        kwargs: Extra keyword arguments for it.

    Attributes:
        leaves: The tensors beside the input that the branch may need a gradient for.
    """

    def __init__(self, branch: nn.Module, kwargs: Mapping[str, Any]) -> None:
        self.branch = branch
        self._modules = _modules_of(branch)
        # Parameters are read at call time, because a module may hold others at another call
        # (torch.func.functional_call, FSDP).
        self._parameters = [
            slot
            for module in self._modules
            for slot in _slots(module, module._parameters, "parameter")
        ]
        self._kwargs = dict(kwargs)
        self._versions = {
            name: version(value) for name, value in kwargs.items() if isinstance(value, Tensor)
        }
        leaves = {id(slot.value): slot.value for slot in self._parameters}
        for name in self._versions:
            if self._kwargs[name].requires_grad:
                leaves[id(self._kwargs[name])] = self._kwargs[name]
        self.leaves = list(leaves.values())

    def first_run(self, x: Tensor) -> Tensor:
        """Runs the branch as any module is run, and notes what it sees.

        Raises:
            TypeError: If the branch returns anything but a tensor.
            RuntimeError: If the branch changes its input in place.
        """
        self._stride = x.stride()
        self._training = [module.training for module in self._modules]
        self._autocast = autocast_now(x.device.type)
        with _LOCK, ExitStack() as stack:
            if any(state.enabled for state in self._autocast):
                stack.enter_context(autocast_as([]))
            if is_capturing(x.device):
                stack.enter_context(RefuseRandomness(_CAPTURING))
            buffers = [
                (slot, slot.value.clone())
                for module in self._modules
                if not (module.training and type(module) in _BATCH_NORMS)
                for slot in _slots(module, module._buffers, "buffer")
            ]
            states = get_states(x.device)
            t = run_branch(self.branch, x, self._kwargs)
            self._draws = draws_since(states)
        # A copy is kept of the few buffers that the branch has changed, to run it from there.
        self._changed, self._unchanged = [], []
        for slot, copy in buffers:
            if slot.table.get(slot.name) is slot.value and version(slot.value) == slot.version:
                self._unchanged.append(slot)
            else:
                self._changed.append((slot, copy))
        return t

    def lay_out(self, x: Tensor) -> Tensor:
        """Returns `x` with the strides that the branch saw first; other strides, other bits."""
        if x.stride() == self._stride:
            return x
        return torch.empty_strided(x.shape, self._stride, dtype=x.dtype, device=x.device).copy_(x)

    def repeat(self, x: Tensor) -> Tensor:
        """Runs the branch again as it ran before, in the current grad mode, leaving no trace.

        Args:
            x: The input of the first run, reconstructed.

        Raises:
            RuntimeError: If a parameter, buffer or argument has changed since, or the branch draws
                other random numbers than before.
        """
        return self._repeat(self.lay_out(x), {})

    def repeat_for_gradients(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Runs the branch like `repeat`, for a graph of its own.

        Returns:
            The tensors to differentiate by, one for each of `leaves`, and the branch's output.
        """
        # The inner differentiation would run a leaf's tensor hooks, and autograd runs them again
        # on what the node returns; a stand-in has none.
        aliases = {
            id(leaf): leaf.detach().requires_grad_(leaf.requires_grad)
            for leaf in self.leaves
            if leaf._backward_hooks or not leaf.is_leaf
        }
        t = self._repeat(x, aliases)
        return [aliases.get(id(leaf), leaf) for leaf in self.leaves], t

    def _repeat(self, x: Tensor, aliases: Mapping[int, Tensor]) -> Tensor:
        kwargs = self._kwargs
        for name, count in self._versions.items():
            if version(kwargs[name]) != count:
                raise _changed(f"argument {name!r}")
        if aliases:
            kwargs = {name: aliases.get(id(value), value) for name, value in kwargs.items()}
        with _LOCK, ExitStack() as stack:
            self._restore_flags(stack)
            self._restore_tensors(stack, aliases)
            if autocast_now(x.device.type) != self._autocast or self._autocast[-1].enabled:
                stack.enter_context(autocast_as(self._autocast))
            if not self._draws:
                return run_branch(self.branch, x.view_as(x), kwargs)
            try:
                with draw_again(self._draws):
                    return run_branch(self.branch, x.view_as(x), kwargs)
            except OtherDrawsError:
                # The draws may have been another thread's, which is no harm if these are all.
                with RefuseRandomness(_OTHER_DRAWS):
                    return run_branch(self.branch, x.view_as(x), kwargs)

    def _restore_flags(self, stack: ExitStack) -> None:
        for module, flag in zip(self._modules, self._training, strict=True):
            if module.training != flag:
                stack.callback(setattr, module, "training", module.training)
                module.training = flag
            if flag and type(module) in _BATCH_NORMS and module.track_running_stats:
                stack.callback(setattr, module, "track_running_stats", True)
                module.track_running_stats = False  # type: ignore[assignment]

    def _restore_tensors(self, stack: ExitStack, aliases: Mapping[int, Tensor]) -> None:
        for slot in self._parameters:
            slot.check()
            value = aliases.get(id(slot.value), slot.value)
            if slot.table.get(slot.name) is not value:
                slot.swap(value, stack)
        for slot in self._unchanged:
            slot.check()
            if slot.table.get(slot.name) is not slot.value:
                slot.swap(slot.value, stack)
        for slot, copy in self._changed:
            # A clone, because a graph that is retained may be run backward again.
            slot.swap(copy.clone(), stack)


def run_branch(branch: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Calls a branch, and refuses one whose result could not be reversed.

    Raises:
        TypeError: If the branch returns anything but a tensor.
        RuntimeError: If the branch changes its input in place.
    """
    before = version(x)
    t = branch(x, **kwargs)
    if not isinstance(t, Tensor):
        raise TypeError(
            f"branch {type(branch).__name__} must return one tensor, got {type(t).__name__}"
        )
    if version(x) != before:
        raise RuntimeError(
            f"branch {type(branch).__name__} changes its input in place, which destroys the stream "
            "that it reads. Start the branch with an operation that is not in place, such as "
            "nn.ReLU(inplace=False)."
        )
    return t


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def _modules_of(branch: nn.Module) -> list[nn.Module]:
    # nn.Module.modules would do, but it builds names too and takes four times as long, for every
    # half-step of every step.
    found: dict[nn.Module, None] = {}
    stack = [branch]
    while stack:
        module = stack.pop()
        if module not in found:
            found[module] = None
            stack.extend(child for child in module._modules.values() if child is not None)
    return list(found)


def _slots(module: nn.Module, table: dict[str, Any], kind: str) -> list[_Slot]:
    return [
        _Slot(table, name, value, version(value), kind, module)
        for name, value in table.items()
        if value is not None
    ]


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} was changed in place between forward and backward, so a reversible branch cannot "
        "be repeated. Call backward() before changing it (an optimizer's step changes parameters)."
    )
