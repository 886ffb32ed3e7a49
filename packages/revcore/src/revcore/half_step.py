"""Half-steps: a scheme is two small functions.

Every reversible scheme in the literature is a list of half-steps. A half-step changes one stream
and reads another::

    a <- combine(a, branch(b))

`combine` can be undone in its first argument, `branch` can be any module. A scheme is therefore
two small functions, `combine` and `uncombine`; inversion, gradients and memory are the engine's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revcore.replay import Replay
from revcore.step import Gradients, Run, Step


class Scheme(ABC):
    """How a branch's output changes a stream, and how that is undone."""

    grid: int | None = None

    @abstractmethod
    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the new stream from the old one, `a`, and a branch's output, `t`."""

    @abstractmethod
    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the old stream: `uncombine(combine(a, t), t) == a` up to rounding."""

    def log_det(self, a: Tensor, t: Tensor) -> Tensor | None:
        """Returns log |det J| of `combine(a, t)` in `a` for each sample; None where it is zero.

        A chain with `log_det=True` asks for it.

        Args:
            a: The old stream, of shape (batch, ...).
            t: The branch's output.

        Returns:
            A tensor of shape (batch,).
        """
        raise TypeError(
            f"{type(self).__name__} has no log-determinant; define log_det(a, t), or give the "
            "chain log_det=False"
        )

    def combine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `combine(a, t)`; autograd's unless a scheme knows better."""
        return _vjp(self.combine, a, t, grad)  # type: ignore[return-value]

    def uncombine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `uncombine(a, t)`; autograd's unless a scheme knows better."""
        return _vjp(self.uncombine, a, t, grad)  # type: ignore[return-value]


def _vjp(function: Callable[..., Any], a: Tensor, t: Tensor, grad: Any) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        grads: Sequence[Tensor] = torch.func.vjp(function, a, t)[1](grad)
        return grads
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        t = t.detach().requires_grad_()
        return torch.autograd.grad(function(a, t), (a, t), grad, materialize_grads=True)


class HalfStep(Step):
    """Creates one update `streams[target] <- combine(streams[target], branch(streams[source]))`.

    Args:
        scheme: Says what `combine` and `uncombine` are.
        branch: The module that reads the source stream.
        target: Index of the stream that changes.
        source: Index of the stream that the branch reads; never the target.
        inverted: Whether this is the update (False) or the way back (True).

    Raises:
        ValueError: If target and source are the same stream, or not an index.

    Example:
        >>> import revcore
        >>> coupling = revcore.AdditiveCoupling(nn.Linear(2, 2), nn.Tanh())
        >>> HalfStep(coupling, coupling.g, target=1, source=0)
        HalfStep(AdditiveCoupling, Tanh, target=1, source=0)
    """

    measures = False

    def __init__(
        self, scheme: Scheme, branch: nn.Module, target: int, source: int, *, inverted: bool = False
    ) -> None:
        if target == source or target < 0 or source < 0:
            raise ValueError(
                "a half-step must read another stream than the one that it changes, both counted "
                f"from 0, got target={target} and source={source}"
            )
        self.scheme = scheme
        self.branch = branch
        self.reads = (target, source)
        self.writes = (target,)
        self.inverted = inverted
        self.grid = scheme.grid

    def __repr__(self) -> str:
        target, source = self.reads
        names = f"{type(self.scheme).__name__}, {type(self.branch).__name__}"
        end = ", inverted=True" if self.inverted else ""
        return f"HalfStep({names}, target={target}, source={source}{end})"

    @property
    def call(self) -> nn.Module:
        return self.branch

    def inverse(self) -> HalfStep:
        return HalfStep(self.scheme, self.branch, *self.reads, inverted=not self.inverted)

    def measured(self) -> HalfStep:
        step = copy.copy(self)
        step.measures = True
        return step

    def apply(self, run: Run, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        a, b = streams
        return self._change(a, run(b))

    def _change(self, a: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        new = self.scheme.uncombine(a, t) if self.inverted else self.scheme.combine(a, t)
        found = self.scheme.log_det(new if self.inverted else a, t) if self.measures else None
        if found is None:
            return (new,)
        return (new, -found if self.inverted else found)

    def _change_vjp(self, a: Tensor, t: Tensor, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(grads) > 1:
            return _vjp(self._change, a, t, tuple(grads))
        vjp = self.scheme.uncombine_vjp if self.inverted else self.scheme.combine_vjp
        return vjp(a, t, grads[0])

    def undo(self, replay: Replay, streams: list[Tensor]) -> None:
        target, source = self.reads
        change = self.scheme.combine if self.inverted else self.scheme.uncombine
        streams[target] = change(streams[target], replay.repeat(streams[source]))

    def backward(
        self,
        replay: Replay,
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> Gradients:
        target, source = self.reads
        graph = replay.repeat_for_gradients(streams[source], needs_x=needed[1])
        # The graph that gives the branch's output back is the one that is differentiated.
        t = graph.t
        if kept is None:
            back = self.scheme.combine if self.inverted else self.scheme.uncombine
            a = back(streams[target], t)
            # What stood there after the step is free before the graph is walked.
            streams[target] = a
        else:
            streams[:] = kept
            a = kept[target]
        grad_a, grad_t = self._change_vjp(a, t, grads)
        return (grad_a, *graph.differentiate(needed[1:], grad_t, self.branch))

    def backward_traced(
        self,
        function: Callable[..., Tensor],
        leaves: Sequence[Tensor],
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: list[Tensor],
    ) -> Sequence[Tensor]:
        target, source = self.reads
        t, pullback, *_ = torch.func.vjp(function, streams[source], *leaves)
        if kept is None:
            back = self.scheme.combine if self.inverted else self.scheme.uncombine
            streams[target] = back(streams[target], t)
        else:
            streams[:] = kept
        grads[target], grad_t = self._change_vjp(
            streams[target], t, [grads[target], *grads[len(streams) :]]
        )
        grad_b, *found = pullback(grad_t.to(t.dtype))
        grads[source] = grads[source] + grad_b
        return tuple(found)
