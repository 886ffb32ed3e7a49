"""What modules hold, by name: looked at again later, and put back for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from revcore.hooks import HOOKS
from revcore.versions import versions

Table = dict[str, Any]

# The last two tell how hooks are called.
_TABLES = (
    *("_modules", "_parameters", "_buffers", *HOOKS),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)


class Snapshot:
    """The attributes, parameters, buffers, hooks and modules of some modules, as they are now.

    What an attribute refers to is not looked into.

    Args:
        modules: Those modules.
        contained: Whether their attributes are known to be no tensors.

    Attributes:
        scripted: ScriptModules among them, in which nothing can be put back: their tables are made
            anew each time that one asks.
    """

    def __init__(self, modules: Sequence[nn.Module], *, contained: bool = False) -> None:
        self.scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
        self._states = [*map(_state_of, self.scripted)]
        self._entries: list[tuple[nn.Module, Table, Table]] = []
        for module in modules:
            if module not in self.scripted:
                own = vars(module)
                tables = [own, *[own[name] for name in _TABLES if own.get(name) is not None]]
                self._entries += [(module, table, dict(table)) for table in tables]
        self._index(contained=contained)

    def _index(self, *, contained: bool) -> None:
        self._empty = [table for _, table, held in self._entries if not held]
        # Python finds out in half the time whether values are equal, but of tensors that is not
        # what is asked.
        quick: list[tuple[Table, Table]] = []
        slow: list[tuple[Table, Table]] = []
        for module, table, held in self._entries:
            tensors = not contained or table is module._parameters or table is module._buffers
            (slow if tensors else quick).append((table, held))
        self._quick, self._equal = _columns(quick)
        self._slow, self._same = _columns(slow)

    @classmethod
    def join(cls, parts: Sequence[Snapshot], *, contained: bool) -> Snapshot:
        """Creates one snapshot of several."""
        whole = cls(())
        for part in parts:
            whole.scripted += part.scripted
            whole._states += part._states
            whole._entries += part._entries
        whole._index(contained=contained)
        return whole

    def holds(self) -> bool:
        """Tells whether the modules hold the very same objects."""
        now = _values(self._slow)
        return (
            len(now) == len(self._same)
            and all(map(is_, now, self._same))
            and _are_equal(_values(self._quick), self._equal)
            and not any(self._empty)
            and not (self.scripted and [*map(_state_of, self.scripted)] != self._states)
        )

    def put_back(
        self, others: Mapping[int, Tensor], *, same: bool = False
    ) -> list[tuple[Table, Table]]:
        """Makes the modules hold again what they held.

        Args:
            others: Tensors to put in the place of some, by their `id`.
            same: Whether they hold it now.

        Returns:
            Tables and what they held until now, for `fill`.

        Raises:
            RuntimeError: If there is something to put back in a ScriptModule.
        """
        replaced = any(not others.keys().isdisjoint(state) for state in self._states)
        if replaced or [*map(_state_of, self.scripted)] != self._states:
            raise RuntimeError(
                "a branch has a ScriptModule, in which nothing can be put back as it was in the "
                "forward pass: leave its flags, parameters and buffers as they are until "
                "backward() is done, or store the activations, "
                "revcore.set_reversing(model, False)."
            )
        undo = []
        for _, table, held in self._entries:
            wanted = held
            if not others.keys().isdisjoint(map(id, held.values())):
                wanted = {name: others.get(id(value), value) for name, value in held.items()}
            elif same:
                continue
            undo.append((table, dict(table)))
            fill([(table, wanted)])
        return undo

    def buffers_are_others(self) -> bool:
        """Tells whether there are other buffers now."""
        return any(
            len(table) != len(held) or not all(map(is_, table.values(), held.values()))
            for module, table, held in self._entries
            if table is module._buffers
        )

    def new_results(self) -> list[tuple[nn.Module, str]]:
        """Lists the attributes that have become tensors with a graph since."""
        return [
            (module, name)
            for module, table, held in self._entries
            for name, value in table.items()
            if isinstance(value, Tensor)
            and value.grad_fn is not None
            and held.get(name) is not value
            # A weight that is computed from a weight_orig or weight_g beside it is none.
            and not any(key.startswith(f"{name}_") for key in module._parameters)
        ]


def fill(tables: Sequence[tuple[Table, Table]]) -> None:
    """Fills tables with what they are to hold."""
    for table, held in tables:
        # The order is that of state dicts.
        if [*table] != [*held]:
            table.clear()
        table.update(held)


def _are_equal(one: list[Any], other: list[Any]) -> bool:
    try:
        return one == other
    except Exception:  # noqa: BLE001 - of what is compared: there are tensors now
        return False


def _values(tables: Iterable[Table]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


def _columns(entries: Sequence[tuple[Table, Table]]) -> tuple[list[Table], list[Any]]:
    return [table for table, held in entries if held], _values(held for _, held in entries)


def _state_of(module: Any) -> list[int]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [module.training, *map(id, tensors), *versions(tensors)]
