"""Steps: all that the engine knows of a scheme.

A step is an invertible update of a list of streams by one run of one module. Most are half-steps;
see `revcore.half_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from revcore.replay import Replay

Run = Callable[[Tensor], Tensor]
Gradients = tuple["Tensor | None", ...]


class Step(ABC):
    """An update of some streams that can be undone.

    Attributes:
        branch: The module that is run.
        reads: Indices of the streams that the update depends on.
        writes: Indices of the streams that it changes.
        grid: Number of fractional bits that all values of all streams have, before the step and
            after it; None for any values.
    """

    branch: nn.Module
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    grid: int | None = None

    @property
    @abstractmethod
    def call(self) -> Callable[..., Tensor]:
        """How the branch is run in the direction of this step."""

    @abstractmethod
    def apply(self, run: Run, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns the new values of the streams in `writes`, from those in `reads`.

        Args:
            run: Runs the branch, once.
            streams: The streams in `reads`.
        """

    def measured(self) -> Step:
        """Creates the same step, which also gives its log-determinant.

        Behind the streams, `apply` then returns log |det J| of the step for each sample, of shape
        (batch,), or nothing where that is zero, and `backward` gets its gradient.

        Raises:
            TypeError: If the step has none.
        """
        raise TypeError(f"{self!r} has no log-determinant; give the chain log_det=False")

    @abstractmethod
    def undo(self, replay: Replay, streams: list[Tensor]) -> None:
        """Takes all streams, in place of the list, from after the step to before it."""

    @abstractmethod
    def backward(
        self,
        replay: Replay,
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> Gradients:
        """Undoes the step and differentiates it.

        Args:
            replay: Repeats the branch.
            streams: All streams after the step; on return, before it.
            kept: All streams before the step, if they were kept.
            grads: Gradients of what `apply` returned.
            needed: Whether a gradient is needed: first for each of `reads`, then for each leaf.

        Returns:
            Gradients: first of each of the streams in `reads`, then of each leaf.
        """

    @abstractmethod
    def backward_traced(
        self,
        function: Callable[..., Tensor],
        leaves: Sequence[Tensor],
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: list[Tensor],
    ) -> Sequence[Tensor]:
        """Does what `backward` does, in code that torch.compile can trace.

        Args:
            function: The branch as a function of its input and of `leaves`.
            leaves: The branch's leaves.
            streams: All streams after the step; on return, before it.
            kept: All streams before the step, if they were kept.
            grads: Gradients of all streams after the step, and of the log-determinant if it gave
                one; on return, of the streams before it, and anything.

        Returns:
            Gradients of the leaves.
        """

    @abstractmethod
    def inverse(self) -> Step:
        """Creates the step that undoes this one."""
