"""Code that takes the place of torch's operations: modes, and the classes of tensors.

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
    """Notes what is in the place of torch's operations now, to be there again.

    A backward pass does not run as its forward pass did: `Tensor.backward` leaves the modes, what
    runs on a GPU is differentiated in another thread, and a loss of a class of its own switches off
    what its class does.
    """

    def __init__(self) -> None:
        self._modes = modes_now()
        self._classes = _are_classes_asked()

    def are_here(self) -> bool:
        """Tells whether nothing else is there."""
        return not (self._modes or count_modes()) and self._classes <= _are_classes_asked()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs code in the same modes, and with the same say of the classes of tensors."""
        outside = modes_now()
        with torch._C._EnableTorchFunction() if self._classes else nullcontext():
            _exchange(self._modes)
            try:
                yield
            finally:
                _exchange(outside)


def _exchange(modes: Sequence[Any]) -> None:
    for _ in range(count_modes()):
        _pop()
    for mode in modes:
        _push(mode)
