"""Half-steps that add a branch's output to a stream, or let the branch do so by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from revcore.destination import Destination
from revcore.half_step import HalfStep
from revcore.step import Again, Differentiate, Gradients, Pullback, add
from revcore.streams import Streams
from revcore.tracing import is_traced


def adding(steps: Sequence[HalfStep]) -> Sequence[HalfStep]:
    """Lets the branches that can do so add to the streams: those with a true `adds`.

    Args:
        steps: Half-steps that add, on a grid or not.

    Returns:
        The same, with others in the place of some.
    """
    if is_traced() or not any(map(_adds, steps)):
        return steps
    return [
        AddingStep(s.scheme, s.branch, s.target, s.source, inverted=s.inverted) if _adds(s) else s
        for s in steps
    ]


def _adds(step: HalfStep) -> bool:
    # The class is asked first: a module without the attribute takes long to say so.
    return hasattr(type(step.branch), "adds") and bool(step.branch.adds)


class AddingStep(HalfStep):
    """A half-step that adds, whose branch may add its results to the streams by itself."""

    def apply(self, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        with self._destination(streams, back=False) as destination:
            t = run(streams[self.source])
        self.looked = destination.added and destination.looked
        self._move(streams, t, destination)

    def undo(self, again: Again, streams: list[Tensor]) -> None:
        with self._destination(streams, back=True) as destination:
            t = again.repeat(streams[self.source])
        self._move(streams, t, destination)

    def rebuild(self, again: Again, streams: list[Tensor], kept: Streams | None) -> Differentiate:
        if kept is not None:
            return super().rebuild(again, streams, kept)
        with self._destination(streams, back=True) as destination:
            t, pull = again.record(streams[self.source])
        self._move(streams, t.detach(), destination)
        return partial(self._pull, pull, destination)

    def _destination(self, streams: Sequence[Tensor], *, back: bool) -> Destination:
        sign = 1 if self.inverted is back else -1
        a, place = streams[self.target], None if back else self.place
        return Destination(self.branch, a, sign, grid=self.grid, reconstructs=back, place=place)

    def _move(self, streams: list[Tensor], t: Tensor, destination: Destination) -> None:
        if not destination.added:
            move = self._back if destination.reconstructs else self._change
            t = move(streams[self.target], t)
        streams[self.target] = t

    def _pull(
        self, pull: Pullback, destination: Destination, grads: Gradients
    ) -> Sequence[Tensor | None]:
        grad = grads[self.target]
        if grad is not None:
            grads[self.target], grad = self._vjp(grad, grad, grad)
        destination.gradient, destination.gradient_added = grads[self.source], False
        of_source, *found = pull(grad)
        if not destination.gradient_added:
            of_source = add(grads[self.source], of_source)
        destination.gradient = None
        grads[self.source] = of_source
        return found
