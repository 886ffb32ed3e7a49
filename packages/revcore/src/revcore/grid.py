"""Fixed-point numbers in floating-point tensors: multiples of 2^-k, which add without rounding.

A float32 has 24 significant bits and a float64 has 53. As long as |x| < 2^(24-k), or 2^(53-k),
sums and differences of multiples of 2^-k are exact, so what was added can be taken away again bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revcore.randomness import is_capturing
from revcore.step import Step
from revcore.streams import Streams, in_transform
from revcore.tracing import is_traced

_DIGITS = {torch.float32: 24, torch.float64: 53}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def to_grid(x: Tensor, bits: int) -> Tensor:
    """Rounds to multiples of 2^-bits; the gradient passes through unchanged.

    Example:
        >>> to_grid(torch.tensor([0.3, -0.3]), 2)
        tensor([ 0.2500, -0.2500])
    """
    y = x.clone()
    # By an alias that has no graph, which sees nothing of this. No zero stays negative: it would
    # not come back so from what is added to it and taken away.
    y.detach().mul_(2.0**bits).round_().mul_(2.0**-bits).add_(0.0)
    return y


def move(a: Tensor, t: Tensor, bits: int, sign: int) -> Tensor:
    """Computes `a + sign * to_grid(t, bits)` for `a` on the grid.

    The gradient is that of `a + sign * t`.
    """
    old, by = a.detach(), t.detach()
    # A bfloat16 has the range of a float32, and whatever it is, the next integer is one, too.
    by = by if by.dtype == torch.bfloat16 else by.to(a.dtype)
    moved = torch.add(old, torch.mul(by, 2.0**bits).round_(), alpha=sign * 2.0**-bits)
    # Where a dimension has size 1 the sums below give other strides, by which kernels go.
    if not torch.is_grad_enabled() and 1 not in moved.shape:
        return moved
    # What is taken away is zero, with a gradient, and changes no bit, not even the sign of a zero.
    plain = torch.add(a, t.to(a.dtype), alpha=sign)
    return moved - (plain.detach() - plain)


class GridWatch:
    """Keeps the streams of one call on the grid of its scheme, if that has one.

    Attributes:
        bits: Fractional bits of the grid, None for no grid.
        entered: Whether the call has begun its first step.
    """

    def __init__(self) -> None:
        self.bits: int | None = None
        self.entered = False
        self._dtype, self._device = torch.float32, torch.device("cpu")
        self._peaks: list[Tensor] = []
        self._place: Tensor | None = None

    def enter(self, steps: Sequence[Step], streams: Sequence[Tensor]) -> Sequence[Tensor]:
        """Rounds the streams where a call begins; later, sees that no step leaves the grid.

        Args:
            steps: The steps that are to come.
            streams: All streams.

        Raises:
            TypeError: If a stream has a dtype without a grid, or another one than the others.
            ValueError: If steps of several grids, or of one and of none, are in one chain.
        """
        for step in steps:
            if not self.entered:
                self.entered, self.bits = True, step.grid
                if step.grid is not None:
                    streams = self._round(step.grid, streams)
            elif step.grid != self.bits:
                raise ValueError(
                    "a chain mixes fixed-point couplings with other blocks, or of several "
                    f"resolutions (fraction_bits {self.bits} and {step.grid}), so it could not be "
                    "reversed bit for bit. Make them chains of their own."
                )
        return streams

    def _round(self, bits: int, streams: Sequence[Tensor]) -> list[Tensor]:
        kinds = {stream.dtype: None for stream in streams}
        if len(kinds) > 1 or not _DIGITS.keys() >= kinds.keys():
            raise TypeError(
                "fixed-point streams must be all float32 or all float64, got "
                f"{', '.join(map(str, kinds))}: call x.float() before the chain. Its branches may "
                "run in any precision."
            )
        self._dtype, self._device = streams[0].dtype, streams[0].device
        # What comes in may be of any size: a sum that fits gives it back.
        return [to_grid(stream, bits) for stream in streams]

    def apply(self, step: Step, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        """Applies a step; if it has a grid, notes how large the values are that it writes."""
        if step.grid is None:
            step.apply(run, streams)
            return
        step.place = self._get_place
        step.apply(run, streams)
        step.place = None  # the tape keeps the step
        if not step.looked:
            self._peaks += [
                torch.linalg.vector_norm(streams[index].detach(), torch.inf)
                for index in step.writes
                if streams[index].numel()
            ]

    def _get_place(self) -> Tensor:
        if self._place is None:
            self._place = torch.zeros((), dtype=self._dtype, device=self._device)
            self._peaks.append(self._place)
        return self._place

    def close(self, streams: Sequence[Tensor]) -> Streams:
        """Ends the call.

        The host reads one number here. Where it cannot (a CUDA graph is being captured, or torch
        only traces), streams that overflowed turn into NaN instead.

        Raises:
            OverflowError: If a value was too large for the grid, or not finite.
        """
        if self.bits is None or not self._peaks:
            return tuple(streams)
        limit = 2.0 ** (_DIGITS[self._dtype] - self.bits)
        peaks = torch.stack(self._peaks)
        fits = peaks < limit  # False for NaN
        if _is_traced(peaks):
            return tuple(torch.where(fits.all(), stream, torch.nan) for stream in streams)
        if not bool(fits.all()):
            first = int(fits.logical_not().int().argmax())
            raise OverflowError(
                f"fixed-point overflow: a stream reached {float(peaks[first]):g}, but with "
                f"fraction_bits={self.bits} in {self._dtype} values must stay below {limit:g}. "
                "Use fewer fraction_bits, float64 streams, or branches with smaller outputs (a "
                "normalization)."
            )
        return tuple(streams)


def sums_of(streams: Sequence[Tensor]) -> Tensor | None:
    """Returns sums of the bits of streams, None where the host cannot compare any."""
    if any(map(_is_traced, streams)):
        return None
    sums: Any = torch.stack([s for stream in streams for s in _sums_of(stream.detach())])
    whole: Tensor = sums.full_tensor() if hasattr(sums, "full_tensor") else sums  # of a DTensor
    return whole


def _sums_of(x: Tensor) -> tuple[Tensor, Tensor]:
    # Of a negative zero, those of a zero: what is added to it and taken away leaves no sign.
    bits = (x + 0.0).view(_INTEGERS[x.dtype])
    return bits.sum(), bits.mul_(bits).sum()


def compare_sums(before: list[int], streams: Sequence[Tensor]) -> None:
    """Sees that streams were reconstructed bit for bit.

    Raises:
        RuntimeError: If the sums of their bits are others than before.
    """
    now = sums_of(streams)
    if now is not None and now.tolist() != before:
        raise RuntimeError(
            "the input of a fixed-point chain was not reconstructed bit for bit: a branch computed "
            "other bits when it was repeated (revcore.track_drift names it). Compiled branches do "
            "so if they are compiled anew between forward and backward, as for another batch size: "
            "give torch.compile dynamic=True or dynamic=False. So do "
            "kernels that are chosen around the forward pass alone, and those that are not "
            "deterministic."
        )


def _is_traced(x: Tensor) -> bool:
    return (
        x.device.type == "meta"
        or is_traced()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or in_transform()
        or is_capturing(x.device)
    )
