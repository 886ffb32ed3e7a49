"""What the branches of a node are made of when they run first, and whether they still are."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_pre_hooks

from revcore.arguments import Arguments, tensors_of
from revcore.randomness import is_capturing
from revcore.surroundings import are_overridden
from revcore.survey import Group, needs_of
from revcore.versions import changed, contents

_hooks = attrgetter("_backward_hooks")
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


class Seen:
    """What some branches are made of when they run first, one after the other.

    Args:
        group: The branches.
        kwargs: Extra keyword arguments for them.
        given: The tensors among these, as the call began.

    Attributes:
        given: The same.
        kwargs: The same.
        same: Whether all is as it was, while somebody knows it; None otherwise.
        usual: Whether then nothing has to be exchanged for a repetition.
        ran: Whether a branch has run that may have changed what another one holds.
        quick: Whether the first runs have neither arguments nor autocast.
        draws: Whether what is around the branches, or their input, may draw random numbers.
    """

    same: bool | None = None
    usual = ran = False

    def __init__(
        self, group: Group, kwargs: Arguments, given: Sequence[Tensor], streams: Sequence[Tensor]
    ) -> None:
        self._group = group
        self.given = given
        self.kwargs = kwargs
        self._tensors, self._needed = group.tensors, group.needed
        if kwargs:
            self._tensors = [*group.tensors, *tensors_of(kwargs)]
            self._needed = needs_of(self._tensors)
        self._contents = contents(self._tensors)
        self.quick = not (kwargs or _is_any_autocast_enabled())
        self.draws = are_overridden([*streams, *given])

    def look(self) -> bool:
        """Tells whether the modules are as they were.

        Raises:
            RuntimeError: If a parameter, an argument or a constant was changed in place.
        """
        now = contents(self._tensors)
        if now != self._contents:
            changes = zip(self._tensors * 2, now, self._contents, strict=True)
            raise changed(self.name(next(tensor for tensor, a, b in changes if a != b)))
        same = self._group.snapshot.holds()
        self.usual = (
            same
            and needs_of(self._tensors) == self._needed
            and not any(map(_hooks, self._tensors))
            and not (self._tensors and is_capturing(self._tensors[0].device))
            and not _is_any_autocast_enabled()
            and not _global_forward_pre_hooks
        )
        return same

    def name(self, tensor: Tensor) -> str:
        """Says which tensor this is."""
        for module in self._group.modules:
            tables = {"parameter": module._parameters, "buffer": module._buffers}
            for kind, table in {**tables, "attribute": vars(module)}.items():
                for name, value in table.items():
                    if value is tensor:
                        return f"{kind} {name!r} of {type(module).__name__}"
        items = self.kwargs.items()
        names = [n for n, v in items if any(t is tensor for t in tensors_of({n: v}))]
        branches = {type(branch).__name__ for branch in self._group.branches}
        return f"argument {names[0]!r}" if names else f"a tensor of {' or '.join(sorted(branches))}"
