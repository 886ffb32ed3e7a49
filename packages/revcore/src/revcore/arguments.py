"""The extra arguments of a call, also those inside of lists, tuples and dicts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Arguments = Mapping[str, Any]

_NESTS = (dict, list, tuple)


def tensors_of(kwargs: Arguments) -> list[Tensor]:
    """Lists the tensors among arguments."""
    return [value for value in _values_of(kwargs) if isinstance(value, Tensor)]


def modules_of(kwargs: Arguments) -> list[nn.Module]:
    """Lists the modules among arguments."""
    return [value for value in _values_of(kwargs) if isinstance(value, nn.Module)]


def _values_of(kwargs: Arguments) -> list[Any]:
    values = [*kwargs.values()]
    for value in values:  # grows meanwhile
        if isinstance(value, _NESTS):
            leaves = tree_leaves(value)
            if len(leaves) == 1 and leaves[0] is value:  # of a class that torch does not know
                leaves = [*(value.values() if isinstance(value, dict) else value)]
            values += leaves
    return values


def takes_gradient(value: Any) -> bool:
    """Tells whether a value is a tensor that may require a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def exchange(kwargs: Arguments, others: Mapping[int, Tensor]) -> Arguments:
    """Copies arguments, with others in the place of some tensors, by their `id`.

    Lists, tuples and dicts are copied, which somebody may change later.
    """
    other = partial(_exchanged, others)
    return {
        name: tree_map(other, value) if isinstance(value, _NESTS) else other(value)
        for name, value in kwargs.items()
    }


def _exchanged(others: Mapping[int, Tensor], value: Any) -> Any:
    if not isinstance(value, (dict, list)):
        return others.get(id(value), value)
    # It is of a class that torch does not know.
    new: Any = copy.copy(value)
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        new[key] = tree_map(partial(_exchanged, others), each)
    return new
