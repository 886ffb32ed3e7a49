"""Any module with `forward` and `inverse`, as a step of a chain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revcore.replay import Replay
from revcore.step import Gradients, Run, Step


class InvertibleStep(Step):
    """Creates the update of all streams by a module that has an inverse of its own.

    The module sees the streams joined in one tensor, and its output is split in the same
    proportions. Undoing it and differentiating it are two runs, so it costs 5/3 of a step that
    stores its activations, where a half-step costs 4/3.

    Args:
        module: Has `inverse(y)`, which gives `x` for `y = module(x)`.
        count: The number of streams.
        split_dim: Dimension along which they are joined.
        inverted: Whether this is the update (False) or the way back (True).
    """

    measures = False

    def __init__(
        self, module: nn.Module, count: int, split_dim: int, *, inverted: bool = False
    ) -> None:
        self.branch = module
        self.reads = self.writes = tuple(range(count))
        self.split_dim = split_dim
        self.inverted = inverted

    def measured(self) -> InvertibleStep:
        if not callable(getattr(self.branch, "log_det", None)):
            raise TypeError(
                f"{type(self.branch).__name__} has no log-determinant; give it a method "
                "log_det(x), which returns that of forward at x, or give the chain log_det=False"
            )
        step = copy.copy(self)
        step.measures = True
        return step

    @property
    def call(self) -> Callable[..., Tensor]:
        return self._measured_call if self.measures else self._way(inverted=self.inverted)

    def _measured_call(self, x: Tensor) -> Tensor:
        y = self._way(inverted=self.inverted)(x)
        if self.inverted:
            return _pack(y, -self.branch.log_det(y), self.split_dim)  # type: ignore[operator]
        return _pack(y, self.branch.log_det(x), self.split_dim)  # type: ignore[operator]

    def _way(self, *, inverted: bool) -> Callable[..., Tensor]:
        return self.branch.inverse if inverted else self.branch  # type: ignore[return-value]

    def inverse(self) -> InvertibleStep:
        return InvertibleStep(
            self.branch, len(self.reads), self.split_dim, inverted=not self.inverted
        )

    def apply(self, run: Run, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._outputs(run(self._join(streams)), streams)

    def undo(self, replay: Replay, streams: list[Tensor]) -> None:
        back = self._way(inverted=not self.inverted)
        x = replay.repeat(self._join(streams), back)
        streams[:] = self._split(x, streams)

    def backward(
        self,
        replay: Replay,
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> Gradients:
        if kept is None:
            with torch.no_grad():
                self.undo(replay, streams)
        else:
            streams[:] = kept
        count = len(streams)
        needs_x = any(needed[:count])
        graph = replay.repeat_for_gradients(self._join(streams), needs_x=needs_x)
        needed = (needs_x, *needed[count:])
        grad_x, *grad_leaves = graph.differentiate(needed, self._grad(grads), self.branch)
        if grad_x is None:
            return (*[None] * count, *grad_leaves)
        return (*self._split(grad_x, streams), *grad_leaves)

    def backward_traced(
        self,
        function: Callable[..., Tensor],
        leaves: Sequence[Tensor],
        streams: list[Tensor],
        kept: Sequence[Tensor] | None,
        grads: list[Tensor],
    ) -> Sequence[Tensor]:
        if kept is None:
            back = self._way(inverted=not self.inverted)
            kept = self._split(back(self._join(streams)), streams)
        streams[:] = kept
        _, pullback, *_ = torch.func.vjp(function, self._join(streams), *leaves)
        grad_x, *found = pullback(self._grad(grads))
        grads[:] = self._split(grad_x, streams)
        return tuple(found)

    def _outputs(self, t: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not self.measures:
            return self._split(t, like)
        x, log_det = _unpack(t, self.split_dim)
        return (*self._split(x, like), log_det)

    def _grad(self, grads: Sequence[Tensor]) -> Tensor:
        if not self.measures:
            return self._join(grads)
        return _pack(self._join(grads[:-1]), grads[-1], self.split_dim)

    def _join(self, streams: Sequence[Tensor]) -> Tensor:
        return streams[0] if len(streams) == 1 else torch.cat(tuple(streams), self.split_dim)

    def _split(self, x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(like) == 1:
            return (x.contiguous(),)
        sizes = [stream.shape[self.split_dim] for stream in like]
        before, after = sum(sizes), x.shape[self.split_dim]
        if any(size * after % before for size in sizes):
            raise ValueError(
                f"{type(self.branch).__name__} made size {after} of size {before} along "
                f"split_dim={self.split_dim}, which cannot be split like the streams, of sizes "
                f"{sizes}"
            )
        parts = x.split([size * after // before for size in sizes], self.split_dim)
        # A part of a tensor has gaps, which a reconstructed stream has not.
        return tuple(part.contiguous() for part in parts)


def _pack(x: Tensor, log_det: Tensor, dim: int) -> Tensor:
    """Joins them as if the log-determinant were one channel more; so it does their gradients."""
    shape = list(x.shape)
    shape[dim] = 1
    log_det = log_det.to(x.dtype).expand(len(x))[:, None]
    channel = nn.functional.pad(log_det, (0, math.prod(shape[1:]) - 1))
    return torch.cat((x, channel.view(shape)), dim)


def _unpack(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x, channel = t.split((t.shape[dim] - 1, 1), dim)
    return x, channel.flatten(1)[:, 0].clone()
