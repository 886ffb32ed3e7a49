"""The additive coupling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revcore.adding import adding
from revcore.coupling import Coupling
from revcore.half_step import HalfStep


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

    @property
    def self_contained(self) -> bool:
        return type(self) is AdditiveCoupling

    def half_steps(self) -> Sequence[HalfStep]:
        # A subclass may combine in another way.
        steps = super().half_steps()
        return adding(steps) if type(self) is AdditiveCoupling else steps

    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        refuse_misfit(a, t)
        return a + t

    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        refuse_misfit(a, t)
        return a - t

    log_det = None  # type: ignore[assignment]  # it keeps volumes

    # The gradients are known, so no graph has to be built for them.
    def combine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

    def uncombine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, -grad


def refuse_misfit(a: Tensor, t: Tensor) -> None:
    """Raises for a branch's output of another shape than the stream `a`.

    Broadcasting would hide a mistake: the branch's gradient would not have its output's shape.
    """
    if t.shape != a.shape:
        raise ValueError(
            f"a branch must return the shape of the stream that it is added to: the stream has "
            f"{tuple(a.shape)}, the branch returned {tuple(t.shape)}"
        )
