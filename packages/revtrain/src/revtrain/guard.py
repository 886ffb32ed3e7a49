"""Numbers that are not finite never reach the weights; the device sees to it, no step waits.

The loss of a bad step is multiplied by NaN before the backward pass, so that gradients alone tell
a bad step from a good one: on every process alike, because they are summed over all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Guard:
    """Masks the steps whose loss or gradients are not finite, and holds on to the first batch.

    A step calls, in this order, `hold` on its batch, `poison` on its loss, and `judge` after the
    backward pass. After `patience` bad steps in a row the guard is shut: from then on all steps
    repeat the batch at which it shut and change nothing, until the host looks.

    All state is in tensors that change in place, so that the calls may be captured.

    Args:
        model: Its buffers are masked; the optimizer masks its parameters and its own state.
        device: Where the model is.
        patience: Bad steps in a row that are one too many: 1, or more where a loss scale has to
            find its size.

    Example:
        >>> guard = Guard(nn.BatchNorm1d(2), torch.device("cpu"))
        >>> x, loss = torch.ones(3, 2), torch.tensor(math.nan)
        >>> (x,) = guard.hold(x)
        >>> saved = guard.save_buffers()
        >>> found = guard.judge([torch.ones(2) * guard.poison(loss)], saved)
        >>> found, guard.bad_steps()
        (tensor(1.), 1)
    """

    def __init__(self, model: nn.Module, device: torch.device, patience: int = 1) -> None:
        self.patience = patience
        self._streak = torch.zeros((), dtype=torch.int32, device=device)
        self._held: dict[torch.Size, list[Tensor]] = {}
        by_dtype = defaultdict(list)
        for buffer in model.buffers():
            by_dtype[buffer.dtype].append(buffer)
        self._buffers = list(by_dtype.values())

    @torch.no_grad()
    def hold(self, *batch: Tensor) -> list[Tensor]:
        """Returns the batch to use: this one, or the held one of a guard that is shut."""
        key = batch[0].shape
        if key not in self._held:
            self._held[key] = [torch.empty_like(x).copy_(x) for x in batch]
        shut = self._streak >= self.patience
        for held, x in zip(self._held[key], batch, strict=True):
            torch.where(shut, held, x, out=held)
        return self._held[key]

    def save_buffers(self) -> list[Tensor]:
        """Returns a copy of all buffers, to be given to `judge`."""
        return [torch.cat([b.detach().reshape(-1) for b in group]) for group in self._buffers]

    def poison(self, loss: Tensor) -> Tensor:
        """Returns the loss to differentiate: itself, or NaN if this step must not count."""
        with torch.no_grad():
            bad = (self._streak >= self.patience) | ~loss.isfinite()
            factor = torch.ones_like(loss).masked_fill_(bad, math.nan)
        return loss * factor

    @torch.no_grad()
    def judge(self, grads: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """Finds out whether a step is bad, and puts back the buffers if it is.

        Args:
            grads: All gradients, summed over the processes.
            saved: What `save_buffers` returned before the forward pass.

        Returns:
            1.0 if it is bad, else 0.0, as `found_inf` of fused optimizers wants it.
        """
        # The largest absolute value, because the sum of squares of finite numbers may overflow.
        bad = ~nn.utils.get_total_norm(grads, math.inf).isfinite()
        self._streak.add_(1).masked_fill_(~bad, 0)
        for buffers, old in zip(self._buffers, saved, strict=True):
            new = torch.cat([b.detach().reshape(-1) for b in buffers])
            kept = torch.where(bad, old, new).split([b.numel() for b in buffers])
            views = [part.view(b.shape) for part, b in zip(kept, buffers, strict=True)]
            torch._foreach_copy_([b.detach() for b in buffers], views)
        return bad.float()

    def bad_steps(self) -> int:
        """Waits for the device; returns how many of the last steps in a row were bad."""
        return int(self._streak.item())

    def held_batches(self) -> Iterator[list[Tensor]]:
        """Yields the batches that a guard that is shut repeats: one, or one for each shape."""
        yield from self._held.values()
