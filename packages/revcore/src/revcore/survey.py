"""What a branch is made of, found once and looked through at each call.

Modules and parameters are those of the call, because a module may hold others at another call
(torch.func.functional_call, FSDP). To walk over them takes a while, to see that they are still the
same does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore import cuda_graphs
from revcore.buffers import copy_always, is_settled, stays
from revcore.hooks import has_global_hooks, has_hooks
from revcore.known import BATCH_NORMS, are_of_torch, draw, is_as_declared, is_self_contained
from revcore.snapshot import Snapshot, held_by

_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


def needs_of(tensors: list[Tensor]) -> list[bool]:
    """Tells which tensors require a gradient."""
    return [*map(_requires_grad, tensors)]


class Untracked:
    """A context in which batch norms in training leave their statistics alone, inside of a turn.

    Args:
        norms: Their attributes.
    """

    def __init__(self, norms: Sequence[dict[str, Any]]) -> None:
        self._norms = norms

    def __enter__(self) -> None:
        self._flags = [own["track_running_stats"] for own in self._norms]
        for own in self._norms:
            own["track_running_stats"] = False

    def __exit__(self, *_: object) -> None:
        for own, flag in zip(self._norms, self._flags, strict=True):
            own["track_running_stats"] = flag


class Survey:
    """Creates a survey of the modules in a branch, and of their tensors.

    Args:
        branch: The branch.
        given: Modules among its arguments.

    Attributes:
        given: The same.
        modules: All modules, each once; first the branch, last those that are no submodules.
        name: That of the branch's class.
        snapshot: What they hold.
        tensors: All parameters, each once.
        needed: Which of them require a gradient.
        leaves: Those that do.
        plain: Whether all of them are leaves.
        buffers: Buffers, and tensors in attributes, that a second run must find as the first one
            found them, and for buffers the training flags of their modules.
        settled: Whether it is known of all of these that they are to be copied in each run.
        constants: Those that nothing may change, because no copy can take their place, or because
            the branch does not do so.
        norms: The attributes of batch norms in training, whose buffers no run reads.
        contained: Whether the modules are known to use nothing from elsewhere.
        draws: Whether they may draw random numbers.
        cudnn_draws: Whether cuDNN draws random numbers for them, where it runs.
        remembers: Whether they may call `revcore.remember`.
        lazy: Whether a parameter or a buffer has no shape yet.
        simple: Whether a first run has to note nothing but autocast and random numbers.
        repeats_simply: Whether a repetition has to change nothing but autocast.
        lasts: Whether the survey may be kept until the next call.
        holds_results: Whether an attribute holds what was computed from parameters, whose graph
            others may need.
        walked: Whether a graph of the branch has been looked through.
    """

    walked = False

    def __init__(self, branch: nn.Module, given: Sequence[nn.Module] = ()) -> None:
        modules: list[Any] = [branch]  # nn.Module.modules takes four times as long
        for module in modules:  # grows meanwhile
            modules += [m for m in module._modules.values() if m is not None]
            if len(set(modules)) < len(modules):
                modules[:] = dict.fromkeys(modules)
        recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
        for module in recurrent:
            # cuDNN wants weights that are new to it to be moved, which is no change of them.
            module._update_flat_weights()
        self.cudnn_draws = any(m.training and m.dropout and m.num_layers > 1 for m in recurrent)
        self.name = type(branch).__name__
        self.given = given
        hidden = _hidden(modules, given)
        self.contained = not hidden and all(map(is_self_contained, modules))
        # Replicas of nn.DataParallel hold them elsewhere.
        dicts = [t for m in modules for t in (m._parameters, vars(m).get("_former_parameters", {}))]
        modules += hidden
        self.modules = modules
        self.snapshot = Snapshot(modules)
        self.norms: list[dict[str, Any]] = []
        self.buffers: list[tuple[Tensor, bool | None]] = []
        self.constants: list[Tensor] = []
        self._attributes: list[Tensor] = []
        for module in modules:
            if module not in self.snapshot.scripted:
                self._sort(module)
        tensors = dict.fromkeys(tensor for each in dicts for tensor in each.values())
        tensors.pop(None, None)
        self.tensors: list[Tensor] = [*tensors]
        self.needed = needs_of(self.tensors)
        self.leaves = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.plain = all(tensor.is_leaf for tensor in self.tensors)
        held = [*self.tensors, *(b for m in modules for b in m._buffers.values() if b is not None)]
        self._devices = list(dict.fromkeys(tensor.device for tensor in held))
        self.lazy = any(map(is_lazy, held))
        self.simple = self.contained and self.plain and not (self.buffers or self.lazy)
        self.draws = not self.contained or draw(modules)
        self.remembers = not are_of_torch(modules)
        self.untracked: AbstractContextManager[None] = (
            Untracked(self.norms) if self.norms else nullcontext()
        )
        self.repeats_simply = self.simple and not (self.norms or self.draws)
        self.settled = all(is_settled(buffer, flag) for buffer, flag in self.buffers)
        self.holds_results = any(tensor.grad_fn is not None for tensor in self._attributes)
        # Of what was computed from other parameters (functional_call) nothing must stay alive, nor
        # what an attribute or a hook holds that is removed.
        self.lasts = self.plain and not (
            self.lazy
            or not self.settled
            or self.snapshot.scripted
            or has_global_hooks()
            or any(map(has_hooks, modules))
            or self._attributes
        )

    def _sort(self, module: nn.Module) -> None:
        """Finds what a second run of a module must find as it was, beside parameters."""
        norm = type(module) in BATCH_NORMS
        if norm and module.training and self.contained:
            # Switching `track_running_stats` off repeats such a one exactly, and is cheaper than
            # exchanging buffers, which code around it may read.
            self.norms.append(vars(module))
            return
        buffers = [b for b in module._buffers.values() if not (b is None or is_lazy(b))]
        if norm:
            # Another call may change them, uncounted, after one in evaluation.
            copy_always(buffers)
        values = [] if self.contained else held_by(module)[0]
        # In a tuple nothing can be exchanged.
        tuples = [v for each in values if isinstance(each, tuple) for v in each]
        self.constants += filter(torch.is_tensor, tuples)
        fixed = {*map(id, tuples)}
        attributes = [v for v in values if isinstance(v, Tensor) and id(v) not in fixed]
        self._attributes += [*attributes, *filter(torch.is_tensor, tuples)]
        found: list[tuple[Tensor, bool | None]] = [(b, module.training) for b in buffers]
        found += [(tensor, None) for tensor in attributes]
        for tensor, flag in found:
            if tensor.requires_grad or (norm and self.contained) or stays(tensor, flag):
                self.constants.append(tensor)
            else:
                self.buffers.append((tensor, flag))

    @cached_property
    def runs_cuda_graphs(self) -> bool:
        """Whether torch.compile makes CUDA graphs of one of the modules."""
        return any(map(cuda_graphs.becomes_one, self.modules))

    def devices(self, x: Tensor) -> list[torch.device]:
        """Lists the devices that the branch computes on for an input."""
        return self._devices if x.device in self._devices else [x.device, *self._devices]

    def kinds(self, x: Tensor) -> list[str]:
        """Lists their kinds, and the CPU, for which there is always something to compute."""
        return list(dict.fromkeys(["cpu", *(d.type for d in self.devices(x) if d.type != "meta")]))


def modules_among(values: Sequence[Any]) -> list[Any]:
    """Lists the modules among values; a weak reference to one is none."""
    return [v for v in values if issubclass(type(v), nn.Module) and hasattr(v, "_modules")]


def _hidden(modules: Sequence[nn.Module], given: Sequence[nn.Module]) -> list[nn.Module]:
    """Lists the modules that some hold without registering them, or are given, each once.

    Those are meant that may change something of theirs: in training, and with buffers or of an
    unknown class. One that holds the branch itself, as one does that is held to be asked, is left
    out.
    """
    known, found = {*modules}, list[nn.Module]()
    holders = [module for module in modules if not is_self_contained(module)]
    queue = [*given, *(each for m in holders for each in modules_among(held_by(m)[0]))]
    for module in queue:  # grows meanwhile
        parts = [] if module in known else [*module.modules()]
        for part in parts if modules[0] not in parts else ():
            if part in known or not part.training:
                continue
            known.add(part)
            if not is_self_contained(part):
                found.append(part)
                queue += modules_among(held_by(part)[0])
            elif part._buffers:
                found.append(part)
    return found


class Group:
    """Creates surveys of branches that run one after the other, to be looked through at once.

    Args:
        branches: In the order in which they run.
        given: Modules among their arguments.

    Attributes:
        branches: The same.
        surveys: One for each.
        modules: All modules of all branches.
        snapshot: What they hold.
        tensors: All parameters of all branches, and their buffers that nothing may change.
        needed: Which of them require a gradient.
        lasts: Whether it may be kept until the next call.
    """

    def __init__(self, branches: Sequence[nn.Module], given: Sequence[nn.Module] = ()) -> None:
        self.branches = branches
        self.surveys = surveys = [Survey(branch, given) for branch in branches]
        self.modules = [module for survey in surveys for module in survey.modules]
        self.snapshot = Snapshot((), [survey.snapshot for survey in surveys])
        self.tensors = [t for survey in surveys for t in [*survey.tensors, *survey.constants]]
        self.lasts = not given and all(survey.lasts for survey in surveys)
        self.needed = needs_of(self.tensors)
        self._buffers = [tensor for survey in surveys for tensor, _ in survey.buffers]
        self._declared = [*filter(is_as_declared, {*map(type, self.modules)})]
        # A branch may change what another one of torch's own modules holds, if it is its own, too.
        shared = len({*map(id, self.modules)}) < len(self.modules)
        if shared and not all(survey.contained for survey in surveys):
            for survey in surveys:
                survey.simple = survey.repeats_simply = False

    def holds(self) -> bool:
        """Tells whether new surveys would be the same."""
        return (
            self.snapshot.holds()
            and needs_of(self.tensors) == self.needed
            and not any(tensor.requires_grad for tensor in self._buffers)
            and all(map(is_as_declared, self._declared))
            and not has_global_hooks()
        )


class Groups(dict[int, Group]):
    """The groups of one call of a chain, by the number of branches that ran before.

    They are not part of the chain: a copy of it begins with none.
    """

    def __reduce__(self) -> tuple[type[Groups], tuple[()]]:
        return Groups, ()
