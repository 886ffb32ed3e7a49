"""The affine coupling, and the ways to get scale and shift from a branch's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revcore.coupling import Coupling

ScaleShift = Callable[[Tensor], tuple[Tensor, Tensor]]


def exp_adapter(t: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the exponential of the branch's output as scale, and the output itself as shift.

    A scale that is rounded to zero cannot be undone, and gives gradients that are NaN: outputs must
    stay above -100 in float32, -17 in float16. Those of `bounded_adapter` may be any.

    Args:
        t: Output of a branch, of the shape of a stream.

    Returns:
        Scale and shift, each of the shape of `t`.

    Example:
        >>> exp_adapter(torch.zeros(2))
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return t.exp(), t


def sigmoid_adapter(t: Tensor, split_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Takes even channels as shift, and a shifted sigmoid of the odd ones as scale.

    Args:
        t: Output of a branch, of twice the size of a stream along `split_dim`.
        split_dim: The dimension of the interleaved channels.

    Returns:
        Scale, in (0, 1), and shift, each of half the size of `t` along `split_dim`.

    Raises:
        ValueError: If that size is odd.

    Example:
        >>> scale, shift = sigmoid_adapter(torch.zeros(1, 4))
        >>> scale.shape, shift.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """
    if t.shape[split_dim] % 2:
        raise ValueError(
            f"a branch's output must have twice the size of a stream along split_dim={split_dim}, "
            f"got shape {tuple(t.shape)}"
        )
    shift, log_odds = t.unflatten(split_dim, (-1, 2)).unbind(
        split_dim + 1 if split_dim >= 0 else split_dim
    )
    # The shift by two starts a fresh net near the identity.
    return torch.sigmoid(log_odds + 2.0), shift


def bounded_adapter(t: Tensor, split_dim: int = 1, clamp: float = 2.0) -> tuple[Tensor, Tensor]:
    r"""Takes the first half as log-scale, bounded by an arc tangent, and the second as shift.

    $$s = \exp\left(\tfrac{2c}{\pi} \arctan(t_1 / c)\right) \in (e^{-c}, e^c)$$

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), table 1,
        for the halves. https://arxiv.org/abs/1807.03039

        Guided Image Generation with Conditional Invertible Neural Networks (Ardizzone et al.,
        2019), section 3, for the bound. https://arxiv.org/abs/1907.02392

    Args:
        t: Output of a branch, of twice the size of a stream along `split_dim`.
        split_dim: The dimension of the halves.
        clamp: The bound $c$ of the log-scale.

    Returns:
        Scale and shift, each of half the size of `t` along `split_dim`.

    Example:
        >>> bounded_adapter(torch.tensor([[1e9, 5.0]]))
        (tensor([[7.3891]]), tensor([[5.]]))
    """
    log_scale, shift = t.chunk(2, split_dim)
    return torch.exp(clamp * 2 / torch.pi * torch.atan(log_scale / clamp)), shift


class AffineCoupling(Coupling):
    r"""Creates an affine coupling.

    $$y_1 = x_1 \odot s(f(x_2)) + t(f(x_2)), \qquad y_2 = x_2 \odot s(g(y_1)) + t(g(y_1))$$

    The scale $s > 0$ and the shift $t$ come from the branch's output by `adapter`.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), equations 4 and 5.
        https://arxiv.org/abs/1605.08803

    Args:
        f: Module that reads the second stream.
        g: Module that reads the first.
        split_dim: Dimension along which a single input tensor is split in two equal streams.
        adapter: Maps a branch's output to scale and shift, each of the shape of a stream:
            `exp_adapter` for branches that keep the shape, `sigmoid_adapter` or `bounded_adapter`
            for branches that double the size of `split_dim`, or a function of your own. Bind their
            options by `functools.partial`.

    Raises:
        TypeError: If `adapter` is no function.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> coupling = AffineCoupling(nn.Linear(3, 3), nn.Linear(3, 3), split_dim=-1).double()
        >>> x = torch.randn(5, 6, dtype=torch.float64)
        >>> torch.allclose(coupling.inverse(coupling(x)), x)
        True
    """

    def __init__(
        self, f: nn.Module, g: nn.Module, split_dim: int = 1, adapter: ScaleShift = exp_adapter
    ) -> None:
        super().__init__(f, g, split_dim)
        if not callable(adapter):
            raise TypeError(
                f"adapter (={adapter!r}) must be a function of a branch's output, such as "
                "revcore.sigmoid_adapter"
            )
        self.adapter = adapter

    @property
    def self_contained(self) -> bool:
        adapters = (exp_adapter, sigmoid_adapter, bounded_adapter)
        return type(self) is AffineCoupling and self.adapter in adapters

    def combine(self, a: Tensor, t: Tensor) -> Tensor:
        scale, shift = self._scale_shift(a, t)
        return a * scale + shift

    def uncombine(self, a: Tensor, t: Tensor) -> Tensor:
        scale, shift = self._scale_shift(a, t)
        return (a - shift) / scale

    def log_det(self, a: Tensor, t: Tensor) -> Tensor:
        scale, _ = self._scale_shift(a, t)
        return scale.abs().log().flatten(1).sum(1)

    def _scale_shift(self, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.adapter(t)
        if not (isinstance(found, tuple) and [isinstance(x, Tensor) for x in found] == [True] * 2):
            raise TypeError(
                "the adapter must return a tuple of two tensors, scale and shift, but "
                f"{self.adapter!r} returned {found!r:.80}"
            )
        scale, shift = found
        for name, tensor in (("scale", scale), ("shift", shift)):
            if tensor.shape != a.shape:
                raise ValueError(
                    f"the adapter's {name} must have the shape of the stream, {tuple(a.shape)}; "
                    f"it made {tuple(tensor.shape)} of a branch's output of {tuple(t.shape)}. An "
                    "adapter splits along dimension 1 unless you bind another: "
                    "functools.partial(revcore.sigmoid_adapter, split_dim=...)"
                )
        return scale, shift
