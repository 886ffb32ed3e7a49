"""Counts the memory of tensors, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class track_memory(TorchDispatchMode):  # noqa: N801 - used as a function: `with track_memory()`
    """Creates a context that counts the bytes of tensor storage created inside it.

    It sees every storage that an operation returns, whoever holds it: autograd, a Python
    attribute, the caller. It sees no workspace that a kernel allocates and frees by itself, and
    no sparse tensors. Both counters can be read inside the context and after it.

    Attributes:
        live_bytes: Bytes of the storages created in the context that are still alive.
        peak_bytes: The most bytes that were alive at once.

    Example:
        >>> import torch
        >>> with track_memory() as memory:
        ...     kept = torch.zeros(1000)
        ...     _ = torch.zeros(500)
        ...     del _
        >>> memory.live_bytes, memory.peak_bytes
        (4000, 6000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What came from outside is not counted, nor are results that share its storage.
        for tensor in tree_iter((args, kwargs)):
            if _has_storage(tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if _has_storage(tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, size).atexit = False
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided
