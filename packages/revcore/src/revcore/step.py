"""Steps: all that the engines know of a scheme.

A step is an invertible update of a list of streams by one run of one module. Most are half-steps;
see `revcore.half_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revcore.streams import Streams

Gradients = list[Any]  # of tensors, and of None for zeros
Pullback = Callable[[Any], "Sequence[Tensor | None]"]  # of a tensor, or of None for zeros
Differentiate = Callable[[Gradients], "Sequence[Tensor | None]"]


class Again(Protocol):
    """What runs a branch again as it ran before."""

    def repeat(self, x: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
        """Runs it, or `call` in its place, without gradients."""

    def record(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """Runs it for its graph.

        Returns:
            Its output, and a function from the output's gradient to those of `x` and the leaves.
        """

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a scheme's own arithmetic under the autocast of the forward pass."""


class Step(ABC):
    """An update of some streams that can be undone.

    Attributes:
        branch: The module that is run.
        call: How it is run in the direction of this step.
        inputs: Indices of the streams that the branch reads.
        writes: Indices of the streams that the update changes.
        grid: Number of fractional bits that all values of all streams have, before the step and
            after it; None for any values.
        place: What gives a tensor of one number, which a step with a grid may make infinite if it
            writes a value that is too large. Whoever applies the step sets it.
        looked: Whether the step has looked for such values.
        measures: Whether the step gives its log-determinant, too.
        inverted: Whether this is the way back.
        repeats: Whether undoing the step runs the branch as applying it did.
        self_contained: Whether its own arithmetic is known to use its arguments alone.
    """

    branch: nn.Module
    call: Callable[..., Tensor]
    inputs: tuple[int, ...]
    writes: tuple[int, ...]
    grid: int | None = None
    place: Callable[[], Tensor] | None = None
    looked = False
    measures = False
    inverted = False
    repeats = True
    self_contained = False

    @abstractmethod
    def apply(self, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        """Takes all streams, in place of the list, from before the step to after it.

        Args:
            run: Runs the branch, once.
            streams: All streams.
        """

    @abstractmethod
    def undo(self, again: Again, streams: list[Tensor]) -> None:
        """Takes all streams, in place of the list, from after the step to before it."""

    @abstractmethod
    def rebuild(self, again: Again, streams: list[Tensor], kept: Streams | None) -> Differentiate:
        """Undoes the step, and makes the graph of its branch again.

        Args:
            again: Runs the branch again.
            streams: All streams after the step; on return, before it.
            kept: All streams before the step, if they were kept.

        Returns:
            A function that takes the gradients of all streams, in place of the list, from after
            the step to before it, and returns those of the branch's leaves. None stands for zeros.
        """

    @abstractmethod
    def measured(self) -> Step:
        """Creates the same step, which gives its log-determinant too, for a chain that asks for it.

        `apply` then appends log |det J| of the step for each sample, of shape (batch,), to the
        streams, and what `rebuild` returns takes its gradient from the end of the gradients.

        Raises:
            TypeError: If the step has none.
        """

    @abstractmethod
    def inverse(self) -> Step:
        """Creates the step that undoes this one."""


def log_det_of(x: Tensor, log_det: Any, owner: object) -> Tensor:
    """Returns a log-determinant for each sample of `x`.

    Raises:
        ValueError: If it is neither that nor one number for all.
    """
    if not isinstance(log_det, Tensor) or log_det.shape not in ((), (len(x),)):
        got = tuple(log_det.shape) if isinstance(log_det, Tensor) else type(log_det).__name__
        raise ValueError(
            f"log_det of {type(owner).__name__} must return a tensor of shape (batch,) = "
            f"({len(x)},), got {got}"
        )
    return log_det.to(torch.promote_types(log_det.dtype, x.dtype)).expand(len(x))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Adds up two gradients, of which None stands for zeros."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
