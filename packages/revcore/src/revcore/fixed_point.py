"""The fixed-point coupling, which reverses bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from revcore.adding import adding
from revcore.additive import AdditiveCoupling, refuse_misfit
from revcore.grid import move
from revcore.half_step import HalfStep
from revcore.streams import dense


class FixedPointCoupling(AdditiveCoupling):
    r"""Creates an additive coupling in fixed-point arithmetic.

    $$y_1 = x_1 + \mathrm{round}(2^k f(x_2)) / 2^k, \qquad
    y_2 = x_2 + \mathrm{round}(2^k g(y_1)) / 2^k$$

    Streams are multiples of $2^{-k}$ in float32 or float64 tensors, whose sums are exact, so the
    inverse gives back the same bits, whatever the depth and the precision of the branches. Where a
    chain begins, its input is rounded to the grid, whether activations are reversed or stored.
    Rounding passes gradients unchanged: they are those of the additive coupling.

    The range is limited: what is computed must stay below $2^{24-k}$ in float32, $2^{53-k}$ in
    float64. To see that it does, the host waits for the device once a call.

    A branch must compute the same bits each time that it runs on the same input. Compiled branches
    may not, with gradients and without; a chain therefore runs them with gradients both times. It
    is an error if the input of a chain does not come back bit for bit, which the host finds out
    once a backward pass, but not while a CUDA graph is being captured, nor where it does not come
    back: if inputs are kept, or a backward pass ends inside of the chain.
    A net trained reversed then has the bits of one trained with stored activations, as long as no
    branch uses a parameter twice (or a tensor in a list, tuple or dict among its arguments) that
    gets a gradient from elsewhere, too: another branch, another call, a penalty. Those are added up
    in another order. Recurrent layers use theirs so, and `spectral_norm`. Chains of other couplings
    inside of a branch round as they do elsewhere.

    References:
        Reversible Recurrent Neural Networks (MacKay et al., 2018), section 3, for fixed-point
        numbers, whose additions can be undone exactly. https://arxiv.org/abs/1810.10999

    Args:
        f: Module that maps the second stream to the shape of the first.
        g: Module that maps the first stream to the shape of the second.
        split_dim: Dimension along which a single input tensor is split in two equal streams.
        fraction_bits: The number $k$ of bits after the binary point.

    Raises:
        ValueError: If `fraction_bits` is not in 1..52.

    Example:
        >>> import torch
        >>> coupling = FixedPointCoupling(nn.Linear(3, 3), nn.Linear(3, 3), split_dim=-1)
        >>> x = torch.randn(5, 6).mul(2**16).round().div(2**16)
        >>> torch.equal(coupling.inverse(coupling(x)), x)
        True
    """

    def __init__(
        self, f: nn.Module, g: nn.Module, split_dim: int = 1, fraction_bits: int = 16
    ) -> None:
        super().__init__(f, g, split_dim)
        if fraction_bits not in range(1, 53):
            raise ValueError(f"fraction_bits (={fraction_bits}) must be an integer in 1..52")
        self.fraction_bits = fraction_bits

    @property
    def grid(self) -> int:  # type: ignore[override]
        """Number of fractional bits of all values of the streams."""
        return self.fraction_bits

    def half_steps(self) -> Sequence[HalfStep]:
        # A subclass may combine in another way.
        steps = super().half_steps()
        return adding(steps) if type(self) is FixedPointCoupling else steps

    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        refuse_misfit(a, t)
        return move(a, t, self.fraction_bits, 1)

    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        refuse_misfit(a, t)
        return move(a, t, self.fraction_bits, -1)

    # No log-determinant, which other arithmetic would have.
    log_det = None

    def combine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return super().combine_vjp(a, t, _as_stored(grad))

    def uncombine_vjp(self, a: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return super().uncombine_vjp(a, t, _as_stored(grad))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fraction_bits={self.fraction_bits}"


def _as_stored(grad: Tensor) -> Tensor:
    """Returns a gradient as it comes behind the sign in `move`, where activations are stored.

    Kernels may give other bits for other strides, and torch gives others to dimensions of size 1.
    """
    return grad.neg().neg() if 1 in grad.shape else dense(grad)
