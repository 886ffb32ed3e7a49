"""What a branch is made of, found once and looked through at each call.

Modules and parameters are those of the call, because a module may hold others at another call
(torch.func.functional_call, FSDP). To walk over them takes a while, to see that they are still the
same does not.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore.randomness import draw_nothing, is_plain

Table = dict[str, Any]

# These read their running statistics only in evaluation, so switching `track_running_stats` off
# repeats a training-mode run exactly and is cheaper than exchanging buffers. Subclasses may use
# their buffers in other ways and take the general path.
BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}

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
        quiet: Whether the modules are known to draw no random numbers.
        lazy: Whether a parameter has no shape yet.
        simple: Whether a first run has to note nothing but autocast.
        walked: How many nodes the last graph of the branch had, and how many leaves it was allowed.
    """

    walked: tuple[int | None, int] | None = None

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
                # Batch norms also if they track nothing now: a branch around one may have seen to
                # that, and be done when it is repeated.
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
        self.quiet = draw_nothing(modules)
        self.lazy = any(map(is_lazy, self.tensors))
        self.simple = self.quiet and not self.buffered and not self.lazy
        self._parameters = [table for table, _ in self.tables]
        self._values = [value for _, found in self.tables for value in found.values()]
        # Of what was computed from other parameters (functional_call) nothing must stay alive, and
        # a ScriptModule makes its tables anew each time that it is asked.
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in modules)
        self.lasts = self.plain and not self.lazy and not scripted
        if self.lasts:
            self._types = [*map(type, modules)]
            self._owned = [(m.__dict__, m._modules, m._parameters) for m in modules]
            inner = [module._modules for module in modules if module._modules]
            self._all = inner + self._parameters
            self._all_values = [value for table in self._all for value in table.values()]
            tables = [
                (m._modules, m._parameters, m._buffers, m._forward_hooks, m._forward_pre_hooks)
                for m in modules
            ]
            self._empty = [table for each in tables for table in each if not table]

    def holds(self) -> bool:
        """Tells whether a new survey would be the same."""
        if [*map(type, self.modules)] != self._types or any(self._empty):
            return False
        for own, inner, parameters in self._owned:
            if own["_modules"] is not inner or own["_parameters"] is not parameters:
                return False
        for module, flag in self.flags:
            if module.training is not flag:
                return False
        return _same(self._all, self._all_values) and needs_of(self.tensors) == self.needed

    def is_as_it_was(self) -> bool:
        """Tells whether modules have the training flags and the parameters that they had."""
        for module, flag in self.flags:
            if module.training is not flag:
                return False
        return _same(self._parameters, self._values)


class Surveys:
    """The surveys of the branches of a chain, in the order in which a call comes to them.

    They are not part of the chain: a copy of it begins with none.
    """

    def __init__(self) -> None:
        self._known: list[Survey | None] = []

    def __reduce__(self) -> tuple[type[Surveys], tuple[()]]:
        return Surveys, ()

    def get(self, index: int, branch: nn.Module) -> Survey:
        """Returns a survey of a branch as it is now.

        Args:
            index: Which of the branches of a call it is.
            branch: The branch.
        """
        known = self._known[index] if index < len(self._known) else None
        if known is not None and known.modules[0] is branch and known.holds():
            return known
        survey = Survey(branch)
        self._known[index : index + 1] = [survey if survey.lasts else None]
        return survey
