"""Couplings: schemes as modules, and the plain way to compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from revcore.arguments import Arguments
from revcore.compiled import run_stored
from revcore.engine import run
from revcore.grid import GridWatch
from revcore.half_step import HalfStep, Scheme
from revcore.streams import Streams, as_dim, join, split
from revcore.tracing import is_traced


class Coupling(nn.Module, Scheme):
    r"""Base class of the schemes; by default two branches change two streams in turn.

    $$y_1 = \mathrm{combine}(x_1, f(x_2)), \qquad y_2 = \mathrm{combine}(x_2, g(y_1))$$

    A subclass defines `combine` and `uncombine`, and `half_steps` (and `streams`) if it has other
    steps than these two. By itself a coupling is plain PyTorch code that
    stores its activations; in a `ReversibleBlock` or `ReversibleSequential` it is reversed.

    Args:
        f: Module that reads the second stream.
        g: Module that reads the first.
        split_dim: Dimension along which a single input tensor is split in equal streams.

    Attributes:
        streams: How many streams a single input tensor is split in.

    Raises:
        TypeError: If `f` or `g` is not a module, or `split_dim` no integer.

    Example:
        >>> class Scaled(Coupling):
        ...     def combine(self, a, t):
        ...         return 2 * a + t
        ...
        ...     def uncombine(self, a, t):
        ...         return (a - t) / 2
        >>> coupling = Scaled(nn.Tanh(), nn.Tanh())
        >>> coupling
        Scaled(
          split_dim=1
          (f): Tanh()
          (g): Tanh()
        )
    """

    streams: int = 2
    split_dim: int

    def __init__(self, f: nn.Module, g: nn.Module, split_dim: int = 1) -> None:
        super().__init__()
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{name} must be an nn.Module, got {type(module).__name__}; wrap a function "
                    "in a module whose forward calls it"
                )
        self.f = f
        self.g = g
        self.split_dim = as_dim(split_dim)

    def half_steps(self) -> Sequence[HalfStep]:
        """Lists the half-steps in the order of the forward pass.

        It is called for each pass, so a subclass may decide by its present attributes.
        """
        # nn.Module.__getattr__ takes a microsecond for each of them, in each pass.
        modules: dict[str, Any] = self._modules
        return (HalfStep(self, modules["f"], 0, 1), HalfStep(self, modules["g"], 1, 0))

    def inverse_half_steps(self) -> Sequence[HalfStep]:
        """Lists the half-steps in the order of the inverse pass."""
        return [step.inverse() for step in reversed([*self.half_steps()])]

    def _steps(self, *, inverted: bool) -> Sequence[HalfStep]:
        return self.inverse_half_steps() if inverted else self.half_steps()

    def forward(self, *x: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps one tensor to one tensor, or streams to a tuple of as many.

        Args:
            x: One tensor, which is split in equal parts along `split_dim`, or the streams, which
                may be of any sizes that the branches fit.
            kwargs: Passed to every branch.

        Returns:
            A tensor like the input, or a tuple of streams.

        Raises:
            ValueError: If a single tensor cannot be split in equal streams.
        """
        return self._run(self.half_steps(), x, kwargs)

    def inverse(self, *y: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps the output of `forward` back to its input, up to rounding.

        Takes, returns and raises what `forward` does.
        """
        return self._run(self.inverse_half_steps(), y, kwargs)

    def _run(self, steps: Sequence[HalfStep], x: Streams, kwargs: Arguments) -> Tensor | Streams:
        streams = split(x, self.split_dim, self.streams)
        if is_traced():
            watch = GridWatch()
            y = watch.close(run_stored(watch, steps, streams, kwargs))
        else:
            y = run(steps, streams, kwargs)
        return join(x, y, self.split_dim)

    def extra_repr(self) -> str:
        return f"split_dim={self.split_dim}"
