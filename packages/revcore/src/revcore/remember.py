"""Small results of a branch that its repetition gets back instead of computing them again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from revcore.randomness import NO_STATES, States, get_states, set_states
from revcore.streams import alone
from revcore.versions import versions

Tensors = tuple[Tensor, ...]

_OTHER_CALLS = (
    "a reversible branch calls revcore.remember {} often when it is repeated than in its first "
    "run, so it is not the same computation"
)
_CHANGED = (
    "what revcore.remember returned was changed in place, so the branch cannot be repeated; change "
    "a copy, result.clone()"
)


class Memory:
    """What one branch remembers, in the order in which it came to it.

    Attributes:
        again: Whether the run is a repetition, which is given what the first one remembered.
        position: How many results this run has asked for.
        outer: The memory of a branch around this one.
        draws: Devices of the random generators that the branch may draw from, if that matters.
        lends: Whether modules of the branch hold other tensors than usual while it runs.
    """

    again = lends = False
    position = 0
    outer: Memory | None = None
    draws: Sequence[torch.device] | None = None
    _results: tuple[tuple[Tensors, list[int], States], ...] = ()

    def ask(self, compute: Callable[[], Tensors]) -> Tensors:
        """Returns the next result, with the random generators as computing it has left them."""
        if not self.again:
            self._results += (self._compute(compute),)
        elif self.position == len(self._results):
            raise RuntimeError(_OTHER_CALLS.format("more"))
        result, counts, states = self._results[self.position]
        if self.again:
            if versions(result) != counts:
                raise RuntimeError(_CHANGED)
            set_states(states)
        self.position += 1
        return result

    def _compute(self, compute: Callable[[], Tensors]) -> tuple[Tensors, list[int], States]:
        before = NO_STATES if self.draws is None else get_states(self.draws)
        # The branch may be part of another one, which is being repeated.
        result = tuple(map(alone, _ask(self.outer, compute)))
        after = NO_STATES if self.draws is None else get_states(self.draws)
        moved = [b for a, b in zip(before, after, strict=True) if a is not b]
        return result, versions(result), moved

    def close(self) -> None:
        """Ends a run, which has asked as often as the one before it."""
        if self.position < len(self._results):
            raise RuntimeError(_OTHER_CALLS.format("less"))


class _Thread(threading.local):
    """The memory of the branch that is running in this thread."""

    memory: Memory | None = None


thread = _Thread()


def is_lending() -> bool:
    """Tells whether modules of the branch that is running hold other tensors than usual."""
    return thread.memory is not None and thread.memory.lends


def _ask(memory: Memory | None, compute: Callable[[], Tensors]) -> Tensors:
    if memory is not None:
        return memory.ask(compute)
    result: Any = compute()
    if not (isinstance(result, tuple) and all(isinstance(each, Tensor) for each in result)):
        raise TypeError(
            f"compute must return a tuple of tensors, got {result!r:.80}; for a single one return "
            "(tensor,)"
        )
    return result


def remember(compute: Callable[[], Tensors]) -> Tensors:
    """Computes something small once, for a branch that runs twice.

    A reversible branch runs in the forward pass and again in the backward pass. What is expensive
    to compute and small to keep, like the statistics of a batch normalization, need not be computed
    twice: in the second run this returns what the first one got. Outside of a reversible chain, and
    where activations are stored, it only calls `compute`. `torch.compile` breaks its graph here.

    Args:
        compute: Returns a tuple of tensors. They stay in memory until the backward pass, nothing
            may change them in place, and no gradient passes through them: the caller
            differentiates in an `autograd.Function` of its own.

    Returns:
        What `compute` returns, now or in the first run.

    Raises:
        TypeError: If `compute` returns anything else.
        RuntimeError: If the second run asks more or less often than the first one did, or what was
            returned has been changed in place.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 3)
        >>> mean, = remember(lambda: (x.mean(0),))
        >>> mean.shape
        torch.Size([3])
    """
    if torch.compiler.is_dynamo_compiling():
        return _untraced(compute)
    return _remember(compute)


def _remember(compute: Callable[[], Tensors]) -> Tensors:
    with torch.no_grad():
        found = _ask(thread.memory, compute)
        # It may have been there before, with a graph.
        return tuple([each.detach() for each in found])


# Dynamo would compute in both runs.
_untraced = _disable_dynamo(_remember)
