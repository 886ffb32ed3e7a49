"""Half-steps: all that the engine knows of a scheme.

Every reversible scheme in the literature is a list of half-steps. A half-step changes one stream
and reads another::

    a <- combine(a, branch(b))

`combine` can be undone in its first argument, `branch` can be any module. A scheme is therefore
two small functions, `combine` and `uncombine`; inversion, gradients and memory are the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


class Scheme(ABC):
    """How a branch's output changes a stream, and how that is undone."""

    @abstractmethod
    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the new stream from the old one, `a`, and a branch's output, `t`."""

    @abstractmethod
    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the old stream: `uncombine(combine(a, t), t) == a` up to rounding."""

    def combine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `combine(a, t)`; autograd's unless a scheme knows better."""
        return _vjp(self.combine, a, t, grad)

    def uncombine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `uncombine(a, t)`; autograd's unless a scheme knows better."""
        return _vjp(self.uncombine, a, t, grad)


def _vjp(
    function: Callable[[Tensor, Tensor], Tensor], a: Tensor, t: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        t = t.detach().requires_grad_()
        grad_a, grad_t = torch.autograd.grad(function(a, t), (a, t), grad)
    return grad_a, grad_t


@dataclass(frozen=True)
class HalfStep:
    """One update `streams[target] <- combine(streams[target], branch(streams[source]))`.

    Attributes:
        scheme: Says what `combine` and `uncombine` are.
        branch: The module that reads the source stream.
        target: Index of the stream that changes.
        source: Index of the stream that the branch reads; never the target.
        inverted: Whether this is the update (False) or the way back (True).
    """

    scheme: Scheme
    branch: nn.Module
    target: int
    source: int
    inverted: bool = False

    def __post_init__(self) -> None:
        if self.target == self.source:
            raise ValueError(
                "a half-step must read another stream than the one that it changes, got "
                f"target={self.target} and source={self.source}"
            )

    def inverse(self) -> HalfStep:
        """Creates the half-step that undoes this one."""
        return replace(self, inverted=not self.inverted)

    def apply(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the target stream after the half-step; `t` is the branch's output."""
        return self.scheme.uncombine(a, t) if self.inverted else self.scheme.combine(a, t)

    def undo(self, a: Tensor, t: Tensor) -> Tensor:
        """Returns the target stream before the half-step."""
        return self.scheme.combine(a, t) if self.inverted else self.scheme.uncombine(a, t)

    def vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `apply(a, t)` with respect to `a` and `t`."""
        if self.inverted:
            return self.scheme.uncombine_vjp(a, t, grad)
        return self.scheme.combine_vjp(a, t, grad)
