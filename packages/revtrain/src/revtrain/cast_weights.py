"""Weights in autocast's precision, cast all at once instead of one by one.

Autocast casts the weight of a convolution whenever it runs, and autograd casts the gradient back. A
reversible net runs its convolutions twice a step, so RevNet-164 launches 360 small kernels to cast
weights and 170 for gradients, which take a tenth of a step. The weights of a step do not change
while it runs: one kernel casts them all at its start, and one casts all gradients at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# What autocast runs in lower precision, of what nets of images are made of.
_LAYERS = (nn.Conv2d, nn.Linear)


class CastWeights:
    """Lets layers read copies of their weights in another precision, for the length of a step.

    Values and gradients are those of autocast, bit for bit, if a step runs each layer once (a
    reversible chain repeats a layer but differentiates it once). The gradients of a layer that is
    called twice add up in the lower precision. Weights that two layers share are left alone.

    Args:
        model: The network.
        dtype: Autocast's.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weights = CastWeights(layer, torch.bfloat16)
        >>> with weights.in_use():
        ...     layer.weight.dtype
        torch.bfloat16
        >>> layer.weight.dtype
        torch.float32
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        found = [
            (module._parameters, name, weight)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if type(module) in _LAYERS and weight is not None and weight.dtype == torch.float32
        ]
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._places = [place for place in found if uses[id(place[2])] == 1]
        self._weights = [weight for _, _, weight in self._places]
        self._copies = [
            nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
            for weight in self._weights
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Puts the copies in the weights' places; afterwards the weights have their gradients."""
        if not self._copies:
            yield
            return
        with torch.no_grad():
            torch._foreach_copy_(tuple(self._copies), tuple(self._weights))
        for (table, name, _), copy in zip(self._places, self._copies, strict=True):
            table[name] = copy
        try:
            yield
            self._move_gradients()
        finally:
            for (table, name, weight), copy in zip(self._places, self._copies, strict=True):
                table[name] = weight
                copy.grad = None

    def _move_gradients(self) -> None:
        got = [
            (weight, copy.grad)
            for weight, copy in zip(self._weights, self._copies, strict=True)
            if copy.grad is not None
        ]
        if not got:
            return
        # Like the gradients, not the weights: other strides would be copied one by one.
        cast = [torch.empty_like(grad, dtype=weight.dtype) for weight, grad in got]
        torch._foreach_copy_(cast, [grad for _, grad in got])
        for (weight, _), grad in zip(got, cast, strict=True):
            weight.grad = grad if weight.grad is None else weight.grad + grad
