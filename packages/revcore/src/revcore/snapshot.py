"""What modules hold, by name: looked at again later, and put back for a while."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, is_tensor, nn

from revcore.hooks import HOOKS
from revcore.known import is_self_contained
from revcore.turns import TURN
from revcore.versions import versions

Table = dict[Any, Any]

# They tell how hooks are called.
_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_TABLES = ("_modules", "_parameters", "_buffers", *HOOKS, *_OF_HOOKS)
_OF_ALL = frozenset(vars(nn.Module()))
# The largest that are looked into, because that takes its time in each call.
_LARGEST: dict[Any, int] = {
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), 1_000),
    **dict.fromkeys((list, deque), 10_000),
}
_MOST = 100_000


def held_by(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """Lists a module's attributes, and what is in those that are containers, and so on.

    Large ones, such as a vocabulary, are not looked into.

    Returns:
        All values, and those of them that are containers that may change.
    """
    values = [value for name, value in vars(module).items() if name not in _OF_ALL]
    containers: list[Any] = []
    known = set[int]()
    for value in values:  # grows meanwhile
        changes = type(value) in _LARGEST and len(value) <= _LARGEST[type(value)]
        if not (changes or isinstance(value, tuple)) or id(value) in known or len(values) > _MOST:
            continue
        known.add(id(value))
        if changes:
            containers.append(value)
        values += value.values() if isinstance(value, dict) else value
    return values, containers


def source_of(module: nn.Module, name: str) -> str | None:
    """Names the parameter from which a hook computes an attribute before each forward pass.

    So do torch.nn.utils.weight_norm and prune, and spectral_norm as it was.
    """
    names = (f"{name}{end}" for end in ("_orig", "_g", "_v"))
    return next((each for each in names if each in module._parameters), None)


def duplicate(what: Any, *modules: nn.Module) -> Any:
    """Returns a deep copy of a module, or of what holds some, also if they hold autograd's results.

    Those of `torch.nn.utils.weight_norm` do, and compute it anew in each call.
    """
    parts = [part for module in modules or (what,) for part in module.modules()]
    held = (value for part in parts for value in vars(part).values())
    results = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(what, {id(value): value.detach() for value in results})


class Snapshot:
    """The attributes, parameters, buffers, hooks and modules of some modules, as they are now.

    So is what their attributes hold that are dicts, lists or deques, also those inside of others.
    Other objects are not looked into, nor attributes of modules that are self-contained.

    Args:
        modules: Those modules.
        parts: Snapshots of others, which this one is of, too.

    Attributes:
        modules: All of them.
        scripted: ScriptModules among them, in which nothing can be put back: their tables are made
            anew each time that one asks.
    """

    def __init__(self, modules: Sequence[nn.Module], parts: Sequence[Snapshot] = ()) -> None:
        self.modules = list(modules)
        # Entries that are known to be no tensors, and the others.
        self._quick: list[_Entry] = []
        self._slow: list[_Entry] = []
        self._lists: list[Held] = []
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            own = vars(module)
            tables = [own, *[own[name] for name in _TABLES if own.get(name) is not None]]
            contained = is_self_contained(module)
            for container in () if contained else held_by(module)[1]:
                if isinstance(container, dict):
                    tables.append(container)
                else:
                    self._lists.append((container, list(container)))
            for table in tables:
                tensors = not contained or table is module._parameters or table is module._buffers
                (self._slow if tensors else self._quick).append((module, table, dict(table)))
        for part in parts:
            self.modules += part.modules
            self._quick += part._quick
            self._slow += part._slow
            self._lists += part._lists
        self.scripted = [m for m in self.modules if isinstance(m, torch.jit.ScriptModule)]
        self._states = [*map(_state_of, self.scripted)]
        self._kinds = [*map(type, self.modules)]
        self._entries = self._quick + self._slow
        self._empty = [table for _, table, held in self._entries if not held]
        # Python finds out in half the time whether values are equal, but of tensors that is not
        # what is asked.
        self._equals, _, self._equal = _columns(self._quick)
        self._sames, self._names, self._same = _columns(self._slow)
        self._with_tensors = [
            (table, held) for _, table, held in self._entries if any(map(is_tensor, held.values()))
        ]

    def holds(self) -> bool:
        """Tells whether the modules hold the very same objects."""
        now = _values(self._sames)
        return (
            _are_same(now, self._same)
            and _are_equal([*chain.from_iterable(self._sames)], self._names)
            and _are_equal(_values(self._equals), self._equal)
            and not any(self._empty)
            and [*map(type, self.modules)] == self._kinds
            and all(_are_same(now, held) for now, held in self._lists)
            and not (self.scripted and [*map(_state_of, self.scripted)] != self._states)
        )

    def lend(self, others: Mapping[int, Tensor]) -> Loan | None:
        """Lets modules that hold what they held hold other tensors in the place of some.

        Args:
            others: These tensors, by the `id` of those whose place they take.

        Returns:
            What is to be given back; None, and nothing is changed, if it is not that simple.
        """
        if others and (self._lists or self.scripted):
            return None
        loan = Loan()
        for table, held in self._with_tensors if others else ():
            if not others.keys().isdisjoint(map(id, held.values())):
                loan.append((table, held, lent := _exchanged(held, others)))
                table.update(lent)
        return loan

    def put_back(self, others: Mapping[int, Tensor]) -> list[Held]:
        """Makes the modules hold again what they held.

        Args:
            others: Tensors to put in the place of some, by their `id`.

        Returns:
            Places and what they held until now, for `fill`.

        Raises:
            RuntimeError: If there is something to put back in a ScriptModule, or a module was of a
                class that is no more what it was. Nothing is changed then.
        """
        replaced = any(not others.keys().isdisjoint(state) for state in self._states)
        if replaced or [*map(_state_of, self.scripted)] != self._states:
            raise RuntimeError(
                "a branch has a ScriptModule, in which nothing can be put back as it was in the "
                "forward pass: leave its flags, parameters and buffers as they are until "
                "backward() is done, or store the activations, "
                "revcore.set_reversing(model, False)."
            )
        classes: list[tuple[Any, type]] = [
            (module, kind)
            for module, kind in zip(self.modules, self._kinds, strict=True)
            if type(module) is not kind
        ]
        for module, kind in classes:
            if issubclass(kind, type(module)):  # that class is not what it was any more
                raise RuntimeError(
                    f"a module of a branch was a {kind.__name__} in the forward pass and is a "
                    f"{type(module).__name__} now, as if a parametrization had been removed: "
                    "call backward() before that"
                )
        places = [*((table, held) for _, table, held in self._entries), *self._lists]
        # All of them before any is filled, because several modules may hold the same one.
        undo: list[Held] = [(module, type(module)) for module, _ in classes]
        undo += [(place, place.copy()) for place, _ in places]
        fill([*classes, *((place, _exchanged(held, others)) for place, held in places)])
        return undo

    def changes(self, others: Mapping[int, Tensor]) -> list[Change]:
        """Lists what the modules hold now and did not, but for `others`."""
        found: list[Change] = [
            (table, name, held.get(name, _MISSING), value)
            for _, table, held in self._entries
            for name, value in table.items()
            if name not in held or others.get(id(held[name]), held[name]) is not value
        ]
        return found + [
            (values, _ALL, held, list(values))
            for values, held in self._lists
            if not _are_same(values, _exchanged(held, others))
        ]

    def buffers_are_others(self) -> bool:
        """Tells whether there are other buffers now."""
        return any(
            not _are_same([*table.values()], [*held.values()])
            for module, table, held in self._entries
            if table is module._buffers
        )

    def new_results(self) -> list[tuple[nn.Module, Table, Any]]:
        """Lists what has become a tensor with a graph since: whose, where, and its name there."""
        return [
            (module, table, name)
            for module, table, held in self._entries
            for name, value in table.items()
            if isinstance(value, Tensor)
            and value.grad_fn is not None
            and held.get(name) is not value
            and not source_of(module, name)
        ]


_Entry = tuple[nn.Module, Table, Table]
"""A module, a table of it, and what it holds."""


class Loan(list[tuple[Table, Table, Table]]):
    """Tables, what they held, and what they have been lent."""

    def give_back(self) -> bool:
        """Lets the tables hold what they held, if they hold what they have been lent.

        Returns:
            Whether they did; else nothing is changed.
        """
        there = all(
            _are_same([*table.values()], [*lent.values()]) and table.keys() == lent.keys()
            for table, _, lent in self
        )
        for table, held, _ in self if there else ():
            table.update(held)
        return there


Held = tuple[Any, Any]
"""A table, another container or a module, and its entries, its values or its class."""

Change = tuple[Any, Any, Any, Any]
"""A table, a name in it, what was there and what is; or a list and all that it had and has."""

_MISSING = object()
_ALL = object()


@contextmanager
def left_by(changes: Sequence[Change]) -> Iterator[None]:
    """Lets what a run has left be there for a while, where nobody has left anything since.

    What is changed meanwhile stays so.
    """
    with TURN:
        own = [change for change in changes if _is_there(*change[:3])]
        _put([(place, name, value) for place, name, _, value in own])
        try:
            yield
        finally:
            _put([change[:3] for change in own if _is_there(*change[:2], change[3])])


def _put(changes: Sequence[tuple[Any, Any, Any]]) -> None:
    for place, name, value in changes:
        if name is _ALL:
            fill([(place, value)])
        elif value is _MISSING:
            del place[name]
        else:
            place[name] = value


def _is_there(place: Any, name: Any, value: Any) -> bool:
    return _are_same(place, value) if name is _ALL else place.get(name, _MISSING) is value


def fill(places: Sequence[Held]) -> None:
    """Lets places hold what they are to hold."""
    for place, held in places:
        if isinstance(place, nn.Module):
            place.__class__ = held
        elif isinstance(place, list):
            place[:] = held
        elif isinstance(place, deque):
            place.clear()
            place.extend(held)
        else:
            # The order is that of state dicts. A counter would add to what is there.
            if not _are_same([*place], [*held]) or isinstance(place, Counter):
                place.clear()
            place.update(held)


def _exchanged(values: Any, others: Mapping[int, Tensor]) -> Any:
    """Copies a table or a list, with others in the place of some values.

    In a list also behind weak references, as recurrent layers hold their parameters.
    """
    if isinstance(values, dict):
        return {name: others.get(id(value), value) for name, value in values.items()}
    found = [others.get(id(value), value) for value in values]
    for index, value in enumerate(values if others else ()):
        if isinstance(value, ReferenceType) and id(value()) in others:
            found[index] = ref(others[id(value())])
    return found


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _are_equal(one: list[Any], other: list[Any]) -> bool:
    try:
        return one == other
    except Exception:  # noqa: BLE001 - of what is compared: there are tensors now
        return False


def _values(tables: Iterable[Table]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


def _columns(entries: Sequence[_Entry]) -> tuple[list[Table], list[Any], list[Any]]:
    every = [held for _, _, held in entries]
    tables = [table for _, table, held in entries if held]
    return tables, [*chain.from_iterable(every)], _values(every)


def _state_of(module: Any) -> list[int]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    # One that is frozen has no flag.
    return [getattr(module, "training", False), *map(id, tensors), *versions(tensors)]
