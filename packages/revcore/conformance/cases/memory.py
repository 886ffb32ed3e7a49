"""What is kept between forward and backward, and what lives on after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from conformance.adapters import Adapter, CannotAskError
from conformance.questions import Observed, WrongError, question
from conformance.subject import Subject, loss_of

THEME = "Memory"


class _Storages(TorchDispatchMode):
    """Knows the storages made inside it, as large as they are when asked: some are emptied."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._old: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._made: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._note((args, kwargs), self._old, unless=self._made)
        result = func(*args, **(kwargs or {}))
        self._note(result, self._made, unless=self._old)
        return result

    @staticmethod
    def _note(
        tree: Any,
        known: weakref.WeakSet[torch.UntypedStorage],
        unless: weakref.WeakSet[torch.UntypedStorage],
    ) -> None:
        for leaf in tree_iter(tree):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in unless:
                known.add(leaf.untyped_storage())

    def bytes(self) -> int:
        """Adds up what is alive."""
        return sum(storage.nbytes() for storage in self._made)


@question(THEME, alone=True)
def flat_in_depth(adapter: Adapter, device: torch.device) -> Observed:
    """After the forward pass, as much is kept at depth 32 as at depth 4."""
    kept = {}
    for depth in (4, 32):
        subject = Subject(adapter, device, shape=(16, 4), depth=depth)
        with _Storages() as storages:
            loss = loss_of(subject())
            kept[depth] = storages.bytes()
            del loss
    if adapter.stores:
        raise CannotAskError("keeps something of every block by design")
    if kept[32] != kept[4]:
        raise WrongError(f"{kept[32]:,} bytes at depth 32, {kept[4]:,} at depth 4")
    return {}


@question(THEME, alone=True)
def nothing_lives_on(adapter: Adapter, device: torch.device) -> Observed:
    """After backward nothing is kept alive, without help from the garbage collector."""
    subject = Subject(adapter, device)
    with _Storages():
        subject.step()  # the first one imports parts of torch, whose frames hold what they saw
    subject.zero_grad()
    gc.disable()
    try:
        with _Storages() as storages:
            y = subject()
            output = weakref.ref(y)
            loss = loss_of(y)
            del y
            loss.backward()
            subject.zero_grad()
            alive, more = output() is not None, storages.bytes() - loss.nbytes
    finally:
        gc.enable()
    if adapter.stores and alive and device.type == "cuda":
        raise CannotAskError("on a GPU plain autograd keeps its output until the loss goes")
    if alive or more:
        raise WrongError(
            f"{more:,} bytes beside the loss, the output {'alive' if alive else 'gone'}"
        )
    return {}
