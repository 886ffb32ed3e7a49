"""Parameters and buffers as a call found them: seen to be unchanged, and put back in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

Table = dict[str, Any]


class Slots:
    """The places that hold tensors in some modules, and what they held.

    Args:
        kind: "parameter" or "buffer".
        modules: What holds them, itself and not in its children.

    Attributes:
        values: The tensors, in order; one that has several places is there once for each.
        copies: What `replace` should put into the places, if anything.
    """

    def __init__(self, kind: str, modules: Iterable[nn.Module]) -> None:
        self._kind = kind
        self._places: list[tuple[nn.Module, Table, str]] = []
        self.values: list[Tensor] = []
        for module in modules:
            table: Table = module._parameters if kind == "parameter" else module._buffers
            for name, value in table.items():
                if value is not None:
                    self._places.append((module, table, name))
                    self.values.append(value)
        self._versions = [version(value) for value in self.values]
        self.copies: Sequence[Tensor] = ()

    def split_changed(self, copies: Sequence[Tensor]) -> tuple[Slots, Slots]:
        """Tells the places whose tensors were changed since, with their copies, from the others."""
        changed_ones, others = Slots(self._kind, ()), Slots(self._kind, ())
        kept = []
        for place, value, count, copy in zip(
            self._places, self.values, self._versions, copies, strict=True
        ):
            _, table, name = place
            same = table.get(name) is value and version(value) == count
            part = others if same else changed_ones
            part._places.append(place)
            part.values.append(value)
            part._versions.append(count)
            if not same:
                kept.append(copy)
        changed_ones.copies = kept
        return changed_ones, others

    def restore(self, aliases: Mapping[int, Tensor], undo: list[Callable[[], object]]) -> None:
        """Puts the tensors back in their places.

        Args:
            aliases: Stand-ins for some of them, by id.
            undo: Gets what takes that back.

        Raises:
            RuntimeError: If one of them was changed in place.
        """
        for (module, table, name), value, count in zip(
            self._places, self.values, self._versions, strict=True
        ):
            if version(value) != count:
                raise changed(f"{self._kind} {name!r} of {type(module).__name__}")
            wanted = aliases.get(id(value), value) if aliases else value
            if table.get(name) is not wanted:
                _swap(table, name, wanted, undo)

    def replace(self, tensors: Sequence[Tensor], undo: list[Callable[[], object]]) -> None:
        """Puts other tensors in the places; `undo` gets what takes that back."""
        for (_, table, name), tensor in zip(self._places, tensors, strict=True):
            _swap(table, name, tensor, undo)


def _swap(table: Table, name: str, value: Tensor, undo: list[Callable[[], object]]) -> None:
    if name in table:
        undo.append(partial(table.__setitem__, name, table[name]))
    else:
        undo.append(partial(table.pop, name, None))
    table[name] = value


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def changed(what: str) -> RuntimeError:
    """Creates the error for a tensor that a branch cannot be repeated without."""
    return RuntimeError(
        f"{what} was changed in place between forward and backward, so a reversible branch cannot "
        "be repeated. Call backward() before changing it (an optimizer's step changes parameters)."
    )
