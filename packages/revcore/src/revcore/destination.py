"""Streams that a branch adds to by itself: its result to one, its gradient to that of the other.

An additive half-step reads a branch's result and a stream, and writes the new stream; on the way
back it does so with a gradient, too. A branch that begins and ends with kernels of its own can add
where the result is still at hand, which saves writing and reading it once each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor, nn

from revcore.hooks import has_global_hooks, has_hooks


class Destination:
    """Where the results of one run of a branch go; a context around that run.

    A coupling makes one for each run. So may any module that adds a branch's result to something.

    Args:
        branch: Whose results are meant.
        place: What gives the tensor that is `peak`.

    Attributes:
        stream: The tensor that the branch's result is added to; gone after the run.
        sign: 1, or -1 where it is subtracted.
        grid: Number of fractional bits that the result is rounded to before; None if it is not.
            What is added or subtracted is then `round(2**grid * result) / 2**grid`, ties to even.
        reconstructs: Whether a stream is being reconstructed. The gradient that arrives is then
            that of the result, without the sign; else it is that of the new stream.
        added: The branch sets this if what it returns is `stream + sign * result`.
        gradient: Set before the run is differentiated: a tensor that the gradient of the branch's
            input is added to. None if there is none.
        gradient_added: The branch sets this if what it returns is that sum.
        looked: Whether the branch has asked for `peak`.

    Example:
        >>> import torch
        >>> branch, x = nn.Linear(2, 2), torch.zeros(3, 2)
        >>> with Destination(branch, x, 1) as destination:
        ...     y = branch(x)
        >>> y = y if destination.added else x + y  # a Linear has not added it
    """

    __slots__ = (
        *("_branch", "_outer", "_place", "added", "gradient", "gradient_added", "grid"),
        *("looked", "reconstructs", "sign", "stream"),
    )

    def __init__(
        self,
        branch: nn.Module,
        stream: Tensor,
        sign: int,
        *,
        grid: int | None = None,
        reconstructs: bool = False,
        place: Callable[[], Tensor] | None = None,
    ) -> None:
        self._branch = branch
        self.stream, self.sign, self.added = stream, sign, False
        self.grid, self.reconstructs = grid, reconstructs
        self._place, self.looked = place, False
        self.gradient: Tensor | None = None
        self.gradient_added = False

    def __enter__(self) -> Destination:  # noqa: PYI034 - Self needs Python 3.11
        self._outer, _thread.destination = _thread.destination, self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.destination, self._outer = self._outer, None
        del self.stream  # the graph of the run may hold this object, but must not hold the stream

    @property
    def peak(self) -> Tensor | None:
        """Where the branch says on a grid that a value is too large; None if nobody asks.

        A tensor of one number, of the stream's dtype, that branches of a call share. Infinity in it
        says that a value of a new stream is NaN or not below `2**(24 - grid)` in size, in float32,
        or `2**(53 - grid)` in float64; a branch writes nothing else. Who asks for it has to look.
        """
        if self._place is None:
            return None
        self.looked = True
        return self._place()

    def meant_for(self, branch: nn.Module) -> bool:
        """Tells whether this is the branch, and nobody else wants to see its results."""
        return branch is self._branch and not (has_hooks(branch) or has_global_hooks())


class _Thread(threading.local):
    destination: Destination | None = None


_thread = _Thread()


def get_destination(branch: nn.Module) -> Destination | None:
    """Tells a branch where its results go, if it may add them there by itself.

    A branch is told so by an additive or fixed-point coupling if its class has an attribute `adds`,
    which may be a property, and it is true. The branch may then return `stream + sign * result`
    instead of `result`, in the stream's dtype, and set `added`. In the backward pass of that run it
    may return `gradient` and the gradient of its input as one sum, in the input's dtype, and set
    `gradient_added`. What it does not do, the coupling does.

    A stream that requires a gradient gets it as in any addition. While a stream is being
    reconstructed (`reconstructs`) the gradient that arrives is that of `result`: it is passed on as
    it comes, without the sign.

    Args:
        branch: The module that asks. Only the coupling's branch itself gets an answer, not a module
            inside of it; and none if it has hooks, which want to see the results.

    Returns:
        The destination, or None.

    Example:
        >>> from torch import nn
        >>> get_destination(nn.Linear(2, 2)) is None  # not in a coupling
        True
    """
    destination = _thread.destination
    return destination if destination is not None and destination.meant_for(branch) else None
