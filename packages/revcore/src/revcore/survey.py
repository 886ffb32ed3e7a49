"""What a branch is made of, found once and looked through at each call.

Modules and parameters are those of the call, because a module may hold others at another call
(torch.func.functional_call, FSDP). To walk over them takes a while, to see that they are still the
same does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore.hooks import HOOKS, has_global_hooks, has_hooks
from revcore.known import BATCH_NORMS, CODE, CONTAINED, are_self_contained, is_known, is_plain

Table = dict[str, Any]

Change = tuple[Table, str, Any]
"""Where something is, by what name, and what was there."""

ABSENT = object()
"""Stands for no entry of a table."""

# These tell how hooks are called, if there are any.
_KINDS_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")

# Attributes that a user may set between forward and backward: what is active, how much is dropped.
_SETTINGS = (bool, int, float, str)
_OTHERS = ("training", "_is_full_backward_hook")

_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


def needs_of(tensors: list[Tensor]) -> list[bool]:
    """Tells which tensors require a gradient."""
    return [*map(_requires_grad, tensors)]


def _columns(entries: list[Change]) -> tuple[Any, ...]:
    return tuple(zip(*entries, strict=True)) or ((), (), ())


def _hold(tables: Sequence[Table], names: Sequence[str], values: Sequence[Any]) -> bool:
    """Tells whether tables have the very same values by these names; None stands for nothing."""
    return all(map(is_, map(dict.get, tables, names), values))


def _same(tables: list[Table], values: list[Any]) -> bool:
    """Tells whether tables hold the very same values."""
    now: list[Any] = []
    for table in tables:
        now += table.values()
    return len(now) == len(values) and all(map(is_, now, values))


class Survey:
    """Creates a survey of the modules in a branch, and of their tensors.

    Args:
        branch: The branch.

    Attributes:
        modules: All modules, each once; first the branch.
        name: That of the branch's class.
        flags: ScriptModules, which have no table of attributes, and their training flags.
        tables: The attributes of each module with parameters, their table, and what it holds.
        code: Where to find a module's hooks, and code of its own that runs in place of its class's,
            and what is there. None stands for nothing.
        tensors: All parameters, each once.
        needed: Which of them require a gradient.
        leaves: Those that do.
        plain: Whether all of them are leaves.
        buffered: Modules whose buffers a second run must find as the first one found them.
        unbuffered: Modules that had none, but may make some as they run.
        norms: Batch norms in training, whose buffers no run reads.
        contained: Whether the modules are known to use nothing from elsewhere.
        lazy: Whether a parameter or a buffer has no shape yet.
        simple: Whether a first run has to note nothing but autocast.
        lasts: Whether the survey may be kept until the next call.
        known: Whether all of them are torch's own.
        walked: Whether a graph of the branch has been looked through.
        settings: Attributes that may matter and are flags, numbers or texts: where, by what name,
            and their value.
    """

    walked = False

    def __init__(self, branch: nn.Module) -> None:
        modules: list[Any] = [branch]  # nn.Module.modules takes four times as long
        self.tables: list[tuple[Table, Table, Table]] = []
        self.buffered: list[nn.Module] = []
        self.unbuffered: list[nn.Module] = []
        self.norms: list[nn.Module] = []
        self.code: list[Change] = []
        self.settings: list[Change] = []
        tensors: list[Any] = []
        buffers: list[Any] = []
        for module in modules:  # grows meanwhile
            modules += [m for m in module._modules.values() if m is not None]
            if len(set(modules)) < len(modules):
                modules[:] = dict.fromkeys(modules)
            if module._parameters:
                found = dict(module._parameters.items())  # a ScriptModule has no copy()
                self.tables.append((module.__dict__, module._parameters, found))
                tensors += found.values()
            own = module.__dict__
            self.code += [(own, name, own.get(name)) for name in CODE]
            for name in (*HOOKS, *_KINDS_OF_HOOKS) if has_hooks(module) else HOOKS:
                self.code.append((own, name, OrderedDict(own.get(name) or ()) or None))
            if not (module._buffers or type(module) in CONTAINED):
                self.unbuffered.append(module)
            elif module._buffers:
                buffers += module._buffers.values()
                # Switching `track_running_stats` off repeats a batch norm in training exactly, and
                # is cheaper than exchanging buffers. Batch norms also if they track nothing now: a
                # branch around one may have seen to that, and be done when it is repeated.
                norm = module.training and type(module) in BATCH_NORMS
                (self.norms if norm else self.buffered).append(module)
        self.modules = modules
        self.name = type(branch).__name__
        watched = [module for module in modules if not is_plain(module)]
        scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        for module in watched:
            if type(module) not in BATCH_NORMS and module not in scripted:
                own = module.__dict__
                settings = [(own, name, own[name]) for name in own if name not in _OTHERS]
                self.settings += [entry for entry in settings if type(entry[2]) in _SETTINGS]
        # Code that is not torch's may look at the flag of any module inside.
        if any(type(module) not in BATCH_NORMS for module in watched):
            watched = modules
        self.settings += [
            (m.__dict__, "training", m.training) for m in watched if m not in scripted
        ]
        self.flags = [(module, module.training) for module in scripted]
        self.tensors: list[Tensor] = [t for t in dict.fromkeys(tensors) if t is not None]
        self.needed = needs_of(self.tensors)
        self.leaves = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.plain = all(tensor.is_leaf for tensor in self.tensors)
        held = [tensor for tensor in [*tensors, *buffers] if tensor is not None]
        self._devices = list(dict.fromkeys(tensor.device for tensor in held))
        self.contained = are_self_contained(modules) and not has_global_hooks()
        self.known = all(map(is_known, modules))
        self.lazy = any(map(is_lazy, [*self.tensors, *buffers]))
        self.simple = self.contained and not self.buffered and not self.lazy
        # Of what was computed from other parameters (functional_call) nothing must stay alive, and
        # a ScriptModule makes its tables anew each time that it is asked.
        # Nor may what a hook holds stay alive once it is removed.
        hooked = has_global_hooks() or any(value is not None for *_, value in self.code)
        self.lasts = self.plain and not (self.lazy or scripted or hooked)

    def devices(self, x: Tensor) -> list[torch.device]:
        """Lists the devices that the branch computes on for an input."""
        return self._devices if x.device in self._devices else [x.device, *self._devices]

    def kinds(self, x: Tensor) -> list[str]:
        """Lists their kinds, and the CPU, for which there is always something to compute."""
        return list(dict.fromkeys(["cpu", *(d.type for d in self.devices(x) if d.type != "meta")]))

    def find_changes(self) -> list[Change]:
        """Lists the flags, settings and code that are other ones now: where, and what was there."""
        changes: list[Change] = [
            (module.__dict__, "training", flag)
            for module, flag in self.flags
            if module.training is not flag
        ]
        for own, name, value in self.code:
            now = own.get(name)
            if now != value and (now or value):
                was = OrderedDict(value or ()) if name not in CODE else value or ABSENT
                changes.append((own, name, was))
        for own, name, value in self.settings:
            if own.get(name, ABSENT) is not value:
                changes.append((own, name, value))
        return changes


class Group:
    """Creates surveys of branches that run one after the other, to be looked through at once.

    Args:
        branches: In the order in which they run.

    Attributes:
        branches: The same.
        surveys: One for each.
        modules: All modules of all branches.
        tensors: All parameters of all branches.
        lasts: Whether it may be kept until the next call.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        self.branches = branches
        self.surveys = surveys = [Survey(branch) for branch in branches]
        self.modules = modules = [module for survey in surveys for module in survey.modules]
        self.tensors = [tensor for survey in surveys for tensor in survey.tensors]
        self.lasts = all(survey.lasts for survey in surveys)
        tables = [table for survey in surveys for table in survey.tables]
        self._parameters = [table for _, table, _ in tables]
        self._values = [value for *_, found in tables for value in found.values()]
        self._flags = [flag for survey in surveys for flag in survey.flags]
        code = [entry for survey in surveys for entry in survey.code]
        settings = [entry for survey in surveys for entry in survey.settings]
        settings += [entry for entry in code if entry[1] in CODE and entry[2] is None]
        self._settings = _columns(settings)
        self._code = [entry for entry in code if entry[2] is not None]
        self._unhooked = [own[name] for own, name, value in code if name in own and value is None]
        if self.lasts:
            self._needed = needs_of(self.tensors)
            self._types = [*map(type, modules)]
            self._owned = _columns(
                [
                    (m.__dict__, n, m.__dict__[n])
                    for m in modules
                    for n in ("_modules", "_parameters")
                ]
            )
            self._inner = [module._modules for module in modules if module._modules]
            self._inner_values = [value for table in self._inner for value in table.values()]
            own = [(m._modules, m._parameters, m._buffers) for m in modules]
            self._empty = [table for each in own for table in each if not table]

    def holds(self) -> bool:
        """Tells whether new surveys would be the same."""
        return (
            [*map(type, self.modules)] == self._types
            and not any(self._empty)
            and _hold(*self._owned)
            and not has_global_hooks()
            and needs_of(self.tensors) == self._needed
            and self.has_its_modules()
            and self.is_as_it_was()
        )

    def has_its_modules(self) -> bool:
        """Tells whether the modules hold the modules that they held, as far as that is known."""
        return not self.lasts or _same(self._inner, self._inner_values)

    def is_as_it_was(self) -> bool:
        """Tells whether modules have the flags, settings, hooks and parameters that they had."""
        return (
            _hold(*self._settings)
            and _same(self._parameters, self._values)
            and not any(self._unhooked)
            and not (self._flags and any(m.training is not flag for m, flag in self._flags))
            and not (self._code and any(own.get(name) != was for own, name, was in self._code))
        )


class Groups:
    """The groups of one call of a chain, by the number of branches that ran before.

    They are not part of the chain: a copy of it begins with none.

    Args:
        last: Those of the call before. What this one makes no use of is not kept any longer.
    """

    def __init__(self, last: Groups | None = None) -> None:
        self._last = {} if last is None else last._found
        self._found: dict[int, Group] = {}

    def __reduce__(self) -> tuple[type[Groups], tuple[()]]:
        return Groups, ()

    def get(self, before: int, branches: Sequence[nn.Module]) -> Group:
        """Returns a group of branches as they are now.

        Args:
            before: How many branches ran before in this call.
            branches: The branches.
        """
        group = self._last.get(before)
        if group is None or group.branches != branches or not group.holds():
            group = Group(branches)
        if group.lasts:
            self._found[before] = group
        return group

    def close(self) -> None:
        """Ends the call."""
        self._last = {}
