"""What decides which code an operation of torch runs: modes, classes of tensors, kernels' flags.

The default device is a mode, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset((Tensor, nn.Parameter))

count_modes = torch._C._len_torch_function_stack
_are_classes_asked = torch._C._is_torch_function_enabled
_at = torch._C._get_function_stack_at
_push = torch._C._push_on_torch_function_stack
_pop = torch._C._pop_torch_function_stack

# What torch.nn.attention.sdpa_kernel sets. Kernels draw other masks for dropout.
_ATTENTION = [
    (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in ("flash", "mem_efficient", "math", "cudnn")
]
_Kernels = tuple[list[bool], list[int]]


def modes_now() -> list[Any]:
    """Lists the modes of this thread, the innermost last."""
    return [*map(_at, range(count_modes()))]


def are_overridden(tensors: Sequence[Tensor]) -> bool:
    """Tells whether operations on tensors may do anything, such as draw random numbers."""
    return (
        not PLAIN.issuperset(map(type, tensors))
        or torch._C._len_torch_dispatch_stack() > 0
        # Not by its class, which is not imported until somebody sets a default device.
        or any(type(mode).__name__ != "DeviceContext" for mode in modes_now())
    )


class Overrides:
    """Notes what decides now, to decide again.

    A backward pass does not run as its forward pass did: `Tensor.backward` leaves the modes, what
    runs on a GPU is differentiated in another thread, a loss of a class of its own switches off
    what its class does, and a choice of kernels may have been made for the forward pass alone.
    """

    def __init__(self) -> None:
        self._modes = modes_now()
        self._classes = _are_classes_asked()
        self._attention = _kernels_now()

    def are_here(self) -> bool:
        """Tells whether nothing else decides."""
        return (
            not (self._modes or count_modes())
            and self._classes <= _are_classes_asked()
            and self._attention == _kernels_now()
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs code with the same modes, the same say of the classes of tensors, and kernels."""
        modes, kernels = modes_now(), _kernels_now()
        with torch._C._EnableTorchFunction() if self._classes else nullcontext():
            _exchange(self._modes, self._attention)
            try:
                yield
            finally:
                _exchange(modes, kernels)


def _kernels_now() -> _Kernels:
    return [is_enabled() for is_enabled, _ in _ATTENTION], torch._C._get_sdp_priority_order()


def _exchange(modes: Sequence[Any], kernels: _Kernels) -> None:
    for _ in range(count_modes()):
        _pop()
    for mode in modes:
        _push(mode)
    flags, order = kernels
    for (_, enable), enabled in zip(_ATTENTION, flags, strict=True):
        enable(enabled)
    torch._C._set_sdp_priority_order(order)
