"""Version counters: how changes in place are seen."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Collection[Tensor]) -> list[int]:
    """Counts the in-place changes of each tensor."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor
        return [version(tensor) for tensor in tensors]


def storages(tensors: Collection[Tensor]) -> list[int]:
    """Identifies the memory of each tensor, whoever fills it; of none where there is none."""
    try:
        return [tensor.untyped_storage()._cdata for tensor in tensors]
    except (RuntimeError, NotImplementedError, ValueError):  # wraps others, or is lazy
        return [0] * len(tensors)


def changed(what: str) -> RuntimeError:
    """Creates the error for a tensor that a branch cannot be repeated without."""
    return RuntimeError(
        f"{what} was changed in place between forward and backward, so a reversible branch cannot "
        "be repeated. Call backward() before changing it (an optimizer's step changes parameters)."
    )
