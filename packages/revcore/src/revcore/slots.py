"""Parameters and buffers as a call found them: seen to be unchanged, and put back in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

Undo = list[Callable[[], object]]


class Slots:
    """The places that hold tensors in some modules, and what they held.

    Args:
        kind: "parameter" or "buffer".
        modules: What holds them, itself and not in its children.

    Attributes:
        values: The tensors, in order; one that has several places is there once for each.
    """

    def __init__(self, kind: str, modules: Sequence[nn.Module]) -> None:
        self._kind = kind
        self._places: list[tuple[nn.Module, dict[str, Any], str]] = []
        self.values: list[Tensor] = []
        for module in modules:
            table: dict[str, Any] = module._parameters if kind == "parameter" else module._buffers
            for name, value in table.items():
                if value is not None:
                    self._places.append((module, table, name))
                    self.values.append(value)
        self._versions = versions(self.values)

    def split_changed(self) -> tuple[Slots, list[int]]:
        """Parts the places whose tensors are as they were from the others.

        Returns:
            The former, and the positions of the latter.
        """
        same, moved = Slots(self._kind, ()), []
        for position, ((_, table, name), value, count) in enumerate(
            zip(self._places, self.values, self._versions, strict=True)
        ):
            if table.get(name) is not value or version(value) != count:
                moved.append(position)
                continue
            same._places.append(self._places[position])
            same.values.append(value)
            same._versions.append(count)
        return same, moved

    def restore(self, aliases: Mapping[int, Tensor], undo: Undo) -> None:
        """Puts the tensors back in their places.

        Args:
            aliases: Stand-ins for some of them, by id.
            undo: Gets what takes that back.

        Raises:
            RuntimeError: If one of them was changed in place.
        """
        if versions(self.values) != self._versions:
            raise self._changed()
        for (_, table, name), value in zip(self._places, self.values, strict=True):
            wanted = aliases.get(id(value), value) if aliases else value
            if table.get(name) is not wanted:
                _swap(table, name, wanted, undo)

    def replace(self, position: int, value: Tensor, undo: Undo) -> None:
        """Puts another tensor in a place; `undo` gets what takes that back."""
        _, table, name = self._places[position]
        _swap(table, name, value, undo)

    def _changed(self) -> RuntimeError:
        now = versions(self.values)
        first = [a == b for a, b in zip(now, self._versions, strict=True)].index(False)
        module, _, name = self._places[first]
        return changed(f"{self._kind} {name!r} of {type(module).__name__}")


def _swap(table: dict[str, Any], name: str, value: Tensor, undo: Undo) -> None:
    if name in table:
        undo.append(partial(table.__setitem__, name, table[name]))
    else:
        undo.append(partial(table.pop, name, None))
    table[name] = value


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Counts the in-place changes of each tensor."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor
        return [version(tensor) for tensor in tensors]


def changed(what: str) -> RuntimeError:
    """Creates the error for a tensor that a branch cannot be repeated without."""
    return RuntimeError(
        f"{what} was changed in place between forward and backward, so a reversible branch cannot "
        "be repeated. Call backward() before changing it (an optimizer's step changes parameters)."
    )
