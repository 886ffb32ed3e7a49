"""Sums of a batch that a kernel leaves for the statistics of the batch that it has written.

The kernel that writes a batch has its values at hand, so it can add them up by tiles, which saves
reading them once more. Who normalizes the batch is often another module: the next branch of a
chain, which only gets the batch. So the last batch of a thread, and what is known of it, is kept
here.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class Moments:
    """What is known of a batch whose mean and variance somebody will want; nothing at first.

    Attributes:
        sums: float32, shape `(2, tiles, C)`: the sum of each tile, and that of the squared
            deviations from the tile's own mean. None while nobody has added up anything.
        places: Places of a tile; the last one may have fewer.
    """

    sums: Tensor | None = None
    places: int = 0

    def forget(self) -> None:
        self.sums = None


_Known = tuple[weakref.ref[torch.UntypedStorage], object, Moments]


class _Thread(threading.local):
    last: _Known | None = None


_thread = _Thread()


def tell(x: Tensor, moments: Moments) -> None:
    """Says what is known of a batch that was written now, to whoever normalizes it next.

    That is forgotten with the batch, and as soon as this thread normalizes another one.
    """
    if x.is_inference():  # nobody counts how often it is changed
        return
    reference = weakref.ref(x.untyped_storage(), lambda _: moments.forget())
    _thread.last = reference, _identity(x), moments


def take(x: Tensor) -> Moments | None:
    """Returns what was told of this batch, if it is the last one and nobody has changed it."""
    last, _thread.last = _thread.last, None
    if last is None or x.is_inference():
        return None
    reference, identity, moments = last
    # A detached tensor is another one with the same storage.
    same = reference() is x.untyped_storage() and _identity(x) == identity
    return moments if same else None


def _identity(x: Tensor) -> object:
    return x.dtype, x.shape, x.stride(), x.storage_offset(), x._version
