"""What a branch is made of, found once and looked through at each call.

Modules and parameters are those of the call, because a module may hold others at another call
(torch.func.functional_call, FSDP). To walk over them takes a while, to see that they are still the
same does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore.known import BATCH_NORMS, are_self_contained, is_known, is_plain

Table = dict[str, Any]

_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


def needs_of(tensors: list[Tensor]) -> list[bool]:
    """Tells which tensors require a gradient."""
    return [*map(_requires_grad, tensors)]


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
        flags: Modules whose training flags may matter, and these.
        tables: Each table of parameters, and what it holds.
        tensors: All parameters, each once.
        needed: Which of them require a gradient.
        leaves: Those that do.
        plain: Whether all of them are leaves.
        buffered: Modules with buffers that a second run must find as the first one found them.
        norms: Batch norms in training, whose buffers no run reads.
        contained: Whether the modules are known to use nothing from elsewhere.
        lazy: Whether a parameter has no shape yet.
        simple: Whether a first run has to note nothing but autocast.
        lasts: Whether the survey may be kept until the next call.
        known: Whether all of them are torch's own.
        walked: Whether a graph of the branch has been looked through.
    """

    walked = False

    def __init__(self, branch: nn.Module) -> None:
        modules: list[Any] = [branch]  # nn.Module.modules takes four times as long
        self.tables: list[tuple[Table, Table]] = []
        self.buffered: list[nn.Module] = []
        self.norms: list[nn.Module] = []
        tensors: list[Any] = []
        for module in modules:  # grows meanwhile
            modules += [m for m in module._modules.values() if m is not None]
            if len(set(modules)) < len(modules):
                modules[:] = dict.fromkeys(modules)
            if module._parameters:
                found = dict(module._parameters.items())  # a ScriptModule has no copy()
                self.tables.append((module._parameters, found))
                tensors += found.values()
            if module._buffers:
                # Switching `track_running_stats` off repeats a batch norm in training exactly, and
                # is cheaper than exchanging buffers. Batch norms also if they track nothing now: a
                # branch around one may have seen to that, and be done when it is repeated.
                norm = module.training and type(module) in BATCH_NORMS
                (self.norms if norm else self.buffered).append(module)
        self.modules = modules
        watched = [module for module in modules if not is_plain(module)]
        # Code that is not torch's may look at the flag of any module inside.
        if any(type(module) not in BATCH_NORMS for module in watched):
            watched = modules
        self.flags = [(module, module.training) for module in watched]
        self.tensors: list[Tensor] = [t for t in dict.fromkeys(tensors) if t is not None]
        self.needed = needs_of(self.tensors)
        self.leaves = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.plain = all(tensor.is_leaf for tensor in self.tensors)
        self.contained = are_self_contained(modules)
        self.known = all(map(is_known, modules))
        self.lazy = any(map(is_lazy, self.tensors))
        self.simple = self.contained and not self.buffered and not self.lazy
        # Of what was computed from other parameters (functional_call) nothing must stay alive, and
        # a ScriptModule makes its tables anew each time that it is asked.
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in modules)
        self.lasts = self.plain and not self.lazy and not scripted


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
        self._parameters = [table for table, _ in tables]
        self._values = [value for _, found in tables for value in found.values()]
        self._flags = [flag for survey in surveys for flag in survey.flags]
        if self.lasts:
            self._needed = needs_of(self.tensors)
            self._types = [*map(type, modules)]
            self._owned = [
                (m.__dict__, m._modules, m._parameters, "forward" in m.__dict__) for m in modules
            ]
            self._inner = [module._modules for module in modules if module._modules]
            self._inner_values = [value for table in self._inner for value in table.values()]
            own = [
                (m._modules, m._parameters, m._buffers, m._forward_hooks, m._forward_pre_hooks)
                for m in modules
            ]
            self._empty = [table for each in own for table in each if not table]

    def holds(self) -> bool:
        """Tells whether new surveys would be the same."""
        if [*map(type, self.modules)] != self._types or any(self._empty):
            return False
        for own, inner, parameters, patched in self._owned:
            if (
                own["_modules"] is not inner
                or own["_parameters"] is not parameters
                or ("forward" in own) is not patched
            ):
                return False
        return (
            needs_of(self.tensors) == self._needed
            and self.has_its_modules()
            and self.is_as_it_was()
        )

    def has_its_modules(self) -> bool:
        """Tells whether the modules hold the modules that they held, as far as that is known."""
        return not self.lasts or _same(self._inner, self._inner_values)

    def is_as_it_was(self) -> bool:
        """Tells whether modules have the training flags and the parameters that they had."""
        for module, flag in self._flags:
            if module.training is not flag:
                return False
        return _same(self._parameters, self._values)


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
