"""Measures how far reconstructed activations are from those of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Drift(NamedTuple):
    """How far one reconstruction was off.

    Attributes:
        name: Name of the branch in the module that was asked about.
        error: Norm of the difference over the norm of the true stream, or over a thousandth of that
            of the largest one if it is smaller; the largest of all streams.
    """

    name: str
    error: float


class track_drift:  # noqa: N801 - used as a function: `with track_drift()`
    """Creates a context in which chains keep their activations, and compare them in backward.

    In it a step takes the memory of stored activations. Forward and backward must both be in it.
    What is computed stays the same.

    Example:
        >>> import revcore
        >>> chain = revcore.ReversibleSequential(*(revcore.ReversibleBlock(nn.Linear(4, 4)),) * 3)
        >>> with track_drift() as drift:
        ...     chain(torch.randn(2, 8)).sum().backward()
        >>> len(drift.errors(chain))
        6
        >>> drift.worst(chain).error < 1e-5
        True
    """

    current: track_drift | None = None

    def __init__(self) -> None:
        self._found: list[tuple[nn.Module, Tensor]] = []

    def __enter__(self) -> track_drift:  # noqa: PYI034 - Self needs Python 3.11
        self._outer, track_drift.current = track_drift.current, self
        return self

    def __exit__(self, *_: object) -> None:
        track_drift.current = self._outer

    def compare(self, branch: nn.Module, streams: list[Tensor], truth: Sequence[Tensor]) -> None:
        """Notes how far streams are from what they were before a step; the engine calls it."""
        norms = torch.stack([*map(_norm, truth)])
        # Of a stream of zeros, as momentum begins with, any error would be infinitely large.
        norms = norms.clamp_min(1e-3 * norms.max()).clamp_min(torch.finfo(norms.dtype).tiny)
        pairs = zip(streams, truth, strict=True)
        errors = torch.stack([_norm(stream - true) for stream, true in pairs]) / norms
        self._found.append((branch, errors.max()))

    def errors(self, module: nn.Module) -> list[Drift]:
        """Lists the error before each step, in the order of the backward pass.

        Waits for the device.

        Args:
            module: What the names of branches are looked up in.
        """
        names = {id(part): name for name, part in module.named_modules()}
        return [
            Drift(names.get(id(branch), type(branch).__name__), float(error))
            for branch, error in self._found
        ]

    def worst(self, module: nn.Module) -> Drift:
        """Returns the largest error; a NaN counts as the largest.

        Args:
            module: What the name of the branch is looked up in.

        Raises:
            ValueError: If no chain ran forward and backward in the context.
        """
        errors = self.errors(module)
        if not errors:
            raise ValueError(
                "no reversible chain ran forward and backward inside of track_drift(): put both "
                "passes in the context, and see that the chain is reversing"
            )
        return max(errors, key=lambda drift: (drift.error != drift.error, drift.error))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float64)))
    return norm
