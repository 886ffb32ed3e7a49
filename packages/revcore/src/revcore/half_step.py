"""Half-steps: a scheme is two small functions.

Every reversible scheme in the literature is a list of half-steps. A half-step changes one stream
and reads another::

    a <- combine(a, branch(b))

`combine` can be undone in its first argument, `branch` can be any module. A scheme is therefore
two small functions, `combine` and `uncombine`; inversion, gradients and memory are the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revcore.arguments import takes_gradient
from revcore.graph import refuse_foreign_leaves
from revcore.step import Again, Differentiate, Gradients, Pullback, Step, add, log_det_of
from revcore.streams import Streams
from revcore.tracing import is_traced


class Scheme(ABC):
    """How a branch's output changes a stream, and how that is undone.

    A subclass defines `combine` and `uncombine`. A `HalfStep` applies it to two streams and a
    branch; a `Coupling`, which is a module, lists such half-steps.

    Attributes:
        grid: Number of fractional bits of all values of the streams; None for any values.

    Example:
        >>> class Momentum(Scheme):
        ...     def combine(self, a, t):
        ...         return 0.5 * a + 0.5 * t
        ...
        ...     def uncombine(self, a, t):
        ...         return (a - 0.5 * t) / 0.5
        >>> a, t = torch.tensor(3.0), torch.tensor(-2.0)
        >>> Momentum().uncombine(Momentum().combine(a, t), t)
        tensor(3.)
    """

    grid: int | None = None

    @property
    def self_contained(self) -> bool:
        """Whether the arithmetic is known to use its arguments alone, as it should."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What an ancestor knows of its own arithmetic does not hold for another.
        known = {"combine": ("combine_vjp", "log_det"), "uncombine": ("uncombine_vjp",)}
        for name, others in known.items():
            for other in others:
                if _first(cls, name) < _first(cls, other):
                    setattr(cls, other, getattr(Scheme, other))

    @abstractmethod
    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the new stream from the old one, `a`, and a branch's output, `t`."""

    @abstractmethod
    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the old stream: `uncombine(combine(a, t), t) == a` up to rounding."""

    def log_det(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns log |det J| of `combine(a, t)` in `a` for each sample.

        A chain with `log_det=True` asks for it. A scheme that keeps volumes sets `log_det = None`.

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


def _first(cls: type, name: str) -> int:
    """Returns which of a class and its ancestors, in Python's order, defines a method."""
    return next(number for number, kind in enumerate(cls.__mro__) if name in vars(kind))


def _vjp(function: Callable[..., Any], a: Tensor, t: Tensor, grad: Any) -> Sequence[Tensor | None]:
    if is_traced():
        grads: Sequence[Tensor] = torch.func.vjp(function, a, t)[1](grad)
        return grads
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        t = t.detach().requires_grad_(takes_gradient(t))
        results = function(a, t)
        owner = getattr(function, "__self__", function)
        owner = type(getattr(owner, "scheme", owner)).__name__
        pairs = [(results, grad)]
        if isinstance(results, tuple):  # with a log-determinant, which may be a constant
            every = zip(results, grad, strict=True)
            pairs = [(r, seed) for r, seed in every if r.requires_grad and seed is not None]
        if not pairs:
            return None, None
        for result, _ in pairs:
            if result.requires_grad:
                refuse_foreign_leaves(result, (a, t), f"the coupling ({owner})")
        found, seeds = zip(*pairs, strict=True)
        wanted = (a, t) if t.requires_grad else (a,)
        grads = torch.autograd.grad(found, wanted, seeds, allow_unused=True)
        return grads if t.requires_grad else (*grads, None)


class HalfStep(Step):
    """Creates one update `streams[target] <- combine(streams[target], branch(streams[source]))`.

    Args:
        scheme: Says what `combine` and `uncombine` are.
        branch: The module that reads the source stream.
        target: Index of the stream that changes.
        source: Index of the stream that the branch reads; never the target.
        inverted: Whether this is the update (False) or the way back (True).

    Raises:
        TypeError: If the branch is no module.
        ValueError: If target and source are the same stream, or not an index.

    Example:
        >>> import revcore
        >>> coupling = revcore.AdditiveCoupling(nn.Linear(2, 2), nn.Tanh())
        >>> HalfStep(coupling, coupling.g, target=1, source=0)
        HalfStep(AdditiveCoupling, Tanh, target=1, source=0)
    """

    def __init__(
        self, scheme: Scheme, branch: nn.Module, target: int, source: int, *, inverted: bool = False
    ) -> None:
        if target == source or target < 0 or source < 0:
            raise ValueError(
                "a half-step must read another stream than the one that it changes, both counted "
                f"from 0, got target={target} and source={source}"
            )
        if not isinstance(branch, nn.Module):
            raise TypeError(
                f"branch must be an nn.Module, got {type(branch).__name__}; wrap a function in a "
                "module whose forward calls it"
            )
        self.scheme = scheme
        self.branch = self.call = branch
        self.target, self.source = target, source
        self.inputs = (source,)
        self.writes = (target,)
        self.inverted = inverted
        self.grid = scheme.grid
        self._change, self._back, self._vjp = scheme.combine, scheme.uncombine, scheme.combine_vjp
        if inverted:
            self._change, self._back, self._vjp = self._back, self._change, scheme.uncombine_vjp

    @property
    def self_contained(self) -> bool:  # type: ignore[override]
        return self.scheme.self_contained

    def __repr__(self) -> str:
        names = f"{type(self.scheme).__name__}, {type(self.branch).__name__}"
        end = ", inverted=True" if self.inverted else ""
        return f"HalfStep({names}, target={self.target}, source={self.source}{end})"

    def inverse(self) -> HalfStep:
        ends = self.target, self.source
        return type(self)(self.scheme, self.branch, *ends, inverted=not self.inverted)

    def measured(self) -> HalfStep:
        log_det: Any = self.scheme.log_det
        if log_det is None:
            return self
        step = HalfStep(self.scheme, self.branch, self.target, self.source, inverted=self.inverted)
        step.measures = True
        return step

    def apply(self, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        t = run(streams[self.source])
        if self.measures:
            streams[self.target], log_det = self._measure(streams[self.target], t)
            streams.append(log_det)
        else:
            streams[self.target] = self._change(streams[self.target], t)

    def _measure(self, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        new = self._change(a, t)
        if self.inverted:
            return new, -log_det_of(new, self.scheme.log_det(new, t), self.scheme)
        return new, log_det_of(a, self.scheme.log_det(a, t), self.scheme)

    def undo(self, again: Again, streams: list[Tensor]) -> None:
        t = again.repeat(streams[self.source])
        streams[self.target] = again.compute(self._back, streams[self.target], t)

    def rebuild(self, again: Again, streams: list[Tensor], kept: Streams | None) -> Differentiate:
        if kept is not None:
            streams[:] = kept
        # The graph that gives the branch's output back is the one that is differentiated.
        t, pull = again.record(streams[self.source])
        if kept is None:
            streams[self.target] = again.compute(self._back, streams[self.target], t)
        return partial(self._differentiate, again, streams[self.target], t, pull)

    def _differentiate(
        self, again: Again, a: Tensor, t: Tensor, pull: Pullback, grads: Gradients
    ) -> Sequence[Tensor | None]:
        target, source = self.target, self.source
        if self.measures:
            of_log_det, grad = grads.pop(), grads[target]
            found = again.compute(partial(_vjp, self._measure), a, t, (grad, of_log_det))
        elif grads[target] is not None:
            found = again.compute(self._vjp, a, t, grads[target])
        else:
            found = None, None
        grads[target], grad_t = found
        grad_b, *of_leaves = pull(grad_t)
        grads[source] = add(grads[source], grad_b)
        return of_leaves
