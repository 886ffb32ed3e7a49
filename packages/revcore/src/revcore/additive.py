"""The additive coupling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from revcore.coupling import Coupling
from revcore.destination import Destination
from revcore.half_step import HalfStep
from revcore.step import Again, Differentiate, Gradients, Pullback, add


class AdditiveCoupling(Coupling):
    r"""Creates an additive coupling.

    $$y_1 = x_1 + f(x_2), \qquad y_2 = x_2 + g(y_1)$$

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), equation 7.
        https://arxiv.org/abs/1410.8516

        The Reversible Residual Network: Backpropagation Without Storing Activations
        (Gomez et al., 2017), equation 6. https://arxiv.org/abs/1707.04585

    Args:
        f: Module that maps the second stream to the shape of the first.
        g: Module that maps the first stream to the shape of the second.
        split_dim: Dimension along which a single input tensor is split in two equal streams.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> coupling = AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3), split_dim=-1)
        >>> x = torch.randn(5, 6, dtype=torch.float64)
        >>> coupling = coupling.double()
        >>> torch.allclose(coupling.inverse(coupling(x)), x)
        True
    """

    def half_steps(self) -> Sequence[HalfStep]:
        steps = super().half_steps()
        adds = [getattr(type(step.branch), "adds", False) for step in steps]
        # A subclass may combine in another way.
        if True not in adds or type(self) is not AdditiveCoupling or torch.compiler.is_compiling():
            return steps
        return [
            AddingStep(self, step.branch, step.target, step.source) if own else step
            for step, own in zip(steps, adds, strict=True)
        ]

    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        if t.shape != a.shape:
            raise misfit(a, t)
        return a + t

    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        if t.shape != a.shape:
            raise misfit(a, t)
        return a - t

    log_det = None  # type: ignore[assignment]  # it keeps volumes

    # The gradients are known, so no graph has to be built for them.
    def combine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

    def uncombine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, -grad


class AddingStep(HalfStep):
    """An additive half-step whose branch may add its results to the streams by itself."""

    def apply(self, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        with Destination(self.branch, streams[self.target], 1) as destination:
            t = run(streams[self.source])
        self._move(streams, t, destination)

    def undo(self, again: Again, streams: list[Tensor]) -> None:
        with Destination(self.branch, streams[self.target], -1) as destination:
            t = again.repeat(streams[self.source])
        self._move(streams, t, destination)

    def rebuild(
        self, again: Again, streams: list[Tensor], kept: Sequence[Tensor] | None
    ) -> Differentiate:
        if kept is not None:
            return super().rebuild(again, streams, kept)
        with Destination(self.branch, streams[self.target], -1) as destination:
            t, pull = again.record(streams[self.source])
        self._move(streams, t.detach(), destination)
        return partial(self._pull, pull, destination)

    def _move(self, streams: list[Tensor], t: Tensor, destination: Destination) -> None:
        if destination.added:
            streams[self.target] = t
        elif destination.sign > 0:
            streams[self.target] = self._change(streams[self.target], t)
        else:
            streams[self.target] = self._back(streams[self.target], t)

    def _pull(
        self, pull: Pullback, destination: Destination, grads: Gradients
    ) -> Sequence[Tensor | None]:
        destination.gradient, destination.gradient_added = grads[self.source], False
        of_source, *found = pull(grads[self.target])
        if not destination.gradient_added:
            of_source = add(grads[self.source], of_source)
        destination.gradient = None
        grads[self.source] = of_source
        return found


def misfit(a: Tensor, t: Tensor) -> ValueError:
    """Creates the error for a branch's output `t` that has not the shape of the stream `a`."""
    # Broadcasting would hide a mistake: the branch's gradient would not have its output's shape.
    return ValueError(
        f"a branch must return the shape of the stream that it is added to: the stream has "
        f"{tuple(a.shape)}, the branch returned {tuple(t.shape)}"
    )
