"""What decides, outside of modules, which code runs: modes, classes of tensors, flags, hooks.

The default device is a mode, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revcore.hooks import GLOBAL_TABLES, has_global_hooks

PLAIN = frozenset((Tensor, nn.Parameter))

_count = torch._C._len_torch_function_stack
_are_classes_asked = torch._C._is_torch_function_enabled
_at = torch._C._get_function_stack_at
_push = torch._C._push_on_torch_function_stack
_pop = torch._C._pop_torch_function_stack

# What torch.nn.attention.sdpa_kernel sets. Kernels draw other masks for dropout.
_ATTENTION = [
    (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in ("flash", "mem_efficient", "math", "cudnn")
]
_NO_HOOKS: list[dict[int, Any]] = [{} for _ in GLOBAL_TABLES]
# Modes, kernels of attention, their order, hooks on all modules.
_Deciding = tuple[list[Any], list[bool], list[int], list[dict[int, Any]]]


def _modes_now() -> list[Any]:
    """Lists the modes of this thread, the innermost last."""
    return [*map(_at, range(_count()))]


def are_overridden(tensors: Sequence[Tensor]) -> bool:
    """Tells whether operations on tensors may do anything, such as draw random numbers."""
    return (
        not PLAIN.issuperset(map(type, tensors))
        or torch._C._len_torch_dispatch_stack() > 0
        # Not by its class, which is not imported until somebody sets a default device.
        or any(type(mode).__name__ != "DeviceContext" for mode in _modes_now())
    )


class Surroundings:
    """Notes what decides now, to decide again.

    A backward pass does not run as its forward pass did: `Tensor.backward` leaves the modes, what
    runs on a GPU is differentiated in another thread, a loss of a class of its own switches off
    what its class does, and hooks on all modules, or a choice of kernels, may have been made for
    the forward pass alone.
    """

    def __init__(self) -> None:
        self._now = _now()
        self._classes = _are_classes_asked()

    def are_here(self) -> bool:
        """Tells whether nothing else decides."""
        return self._now == _now() and self._classes <= _are_classes_asked()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs code with the same modes, the same say of the classes of tensors, and so on."""
        outside = _now()
        with torch._C._EnableTorchFunction() if self._classes else nullcontext():
            _exchange(self._now)
            try:
                yield
            finally:
                _exchange(outside)


def _now() -> _Deciding:
    kernels = [is_enabled() for is_enabled, _ in _ATTENTION]
    hooks = [*map(dict, GLOBAL_TABLES)] if has_global_hooks() else _NO_HOOKS
    return _modes_now(), kernels, torch._C._get_sdp_priority_order(), hooks


def _exchange(deciding: _Deciding) -> None:
    modes, kernels, order, hooks = deciding
    for _ in range(_count()):
        _pop()
    for mode in modes:
        _push(mode)
    for (_, enable), enabled in zip(_ATTENTION, kernels, strict=True):
        enable(enabled)
    torch._C._set_sdp_priority_order(order)
    for table, held in zip(GLOBAL_TABLES, hooks, strict=True):
        if table != held:
            table.clear()
            table.update(held)
