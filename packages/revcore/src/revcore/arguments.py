"""The extra arguments of a call, also those inside of lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Arguments = Mapping[str, Any]

_NESTS = (dict, list, tuple)


def tensors_of(kwargs: Arguments) -> list[Tensor]:
    """Lists the tensors among arguments."""
    return [value for value in values_of(kwargs) if isinstance(value, Tensor)]


def values_of(kwargs: Arguments) -> list[Any]:
    """Lists arguments, those in lists, tuples and dicts by themselves."""
    values: list[Any] = []
    for value in kwargs.values():
        values += tree_leaves(value) if isinstance(value, _NESTS) else [value]
    return values


def takes_gradient(value: Any) -> bool:
    """Tells whether a value is a tensor that may require a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def exchange(kwargs: Arguments, others: Mapping[int, Tensor]) -> Arguments:
    """Copies arguments, with others in the place of some tensors, by their `id`.

    Lists, tuples and dicts are copied, which somebody may change later.
    """

    def other(value: Any) -> Any:
        return others.get(id(value), value)

    return {
        name: tree_map(other, value) if isinstance(value, _NESTS) else other(value)
        for name, value in kwargs.items()
    }
