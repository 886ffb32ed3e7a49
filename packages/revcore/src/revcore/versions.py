"""Version counters: how changes in place are seen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

from torch import Tensor

_version: Callable[[Tensor], int] = attrgetter("_version")


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Collection[Tensor]) -> list[int]:
    """Counts the in-place changes of each tensor."""
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # an inference tensor
        return [version(tensor) for tensor in tensors]


def contents(tensors: Collection[Tensor]) -> list[Any]:
    """Identifies what tensors hold: the version of each, then its memory, whoever fills it."""
    try:
        # Not their addresses, of which the next one could get the same.
        storages: list[Any] = [tensor.untyped_storage() for tensor in tensors]
    except (RuntimeError, NotImplementedError, ValueError):  # wraps others, or is lazy
        storages = [0] * len(tensors)
    return versions(tensors) + storages


def changed(what: str) -> RuntimeError:
    """Creates the error for a tensor that a branch cannot be repeated without."""
    return RuntimeError(
        f"{what} was changed in place between forward and backward, so a reversible branch cannot "
        "be repeated. Call backward() before changing it (an optimizer's step changes parameters). "
        "Where the branch itself does so in its first run (initialization from data), run the net "
        "once under torch.no_grad() before; where it does so in each run (normalizing a weight), "
        "do that before the net is called, or by torch.nn.utils.parametrize; where it does so now "
        "and then, assign a new tensor instead."
    )
