"""Any module with `forward` and `inverse`, as a step of a chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revcore.cuda_graphs import lasting
from revcore.step import Again, Differentiate, Gradients, Pullback, Step, log_det_of
from revcore.streams import Streams, dense
from revcore.tracing import is_traced


class InvertibleStep(Step):
    """Creates the update of all streams by a module that has an inverse of its own.

    The module sees the streams joined in one tensor, and its output is split in the same
    proportions. Undoing it and differentiating it are two runs, so it costs 5/3 of a step that
    stores its activations, where a half-step costs 4/3.

    Its inverse may come to random numbers and to buffers in another order than the forward pass
    did, so where that has drawn numbers or changed buffers the engine keeps its input.

    Args:
        module: Has `inverse(y)`, which gives `x` for `y = module(x)`, unless its input is kept.
        count: The number of streams.
        split_dim: Dimension along which they are joined.
        inverted: Whether this is the update (False) or the way back (True).
    """

    repeats = False
    _dtype: torch.dtype | None = None
    _shape: torch.Size | None = None

    def __init__(
        self, module: nn.Module, count: int, split_dim: int, *, inverted: bool = False
    ) -> None:
        self.branch: Any = module
        self.inputs = self.writes = tuple(range(count))
        self.split_dim = split_dim
        self.inverted = inverted
        directions: tuple[Any, Any] = (module, getattr(module, "inverse", None))
        self.call, self._back = reversed(directions) if inverted else directions

    def inverse(self) -> InvertibleStep:
        return InvertibleStep(
            self.branch, len(self.inputs), self.split_dim, inverted=not self.inverted
        )

    def measured(self) -> InvertibleStep:
        if not callable(getattr(self.branch, "log_det", None)):
            raise TypeError(
                f"{type(self.branch).__name__} has no log-determinant; give it a method "
                "log_det(x), which returns that of forward at x, or give the chain log_det=False"
            )
        step = InvertibleStep(self.branch, len(self.inputs), self.split_dim, inverted=self.inverted)
        step.measures, step.call = True, step._measure
        return step

    def _measure(self, x: Tensor, **kwargs: Any) -> Tensor:
        if self.inverted:
            y = self.branch.inverse(x, **kwargs)
            log_det = -log_det_of(y, self.branch.log_det(y, **kwargs), self.branch)
        else:
            y = self.branch(x, **kwargs)
            log_det = log_det_of(x, self.branch.log_det(x, **kwargs), self.branch)
        if not is_traced():  # which cannot trace that
            self._dtype = y.dtype
        return self._pack(y, log_det)

    def _pack(self, x: Tensor, log_det: Tensor) -> Tensor:
        """Joins them, or their gradients, as if the log-determinant were one channel more.

        In the precision of the better one: autocast has a sum in float32 beside streams in less.
        """
        shape = list(x.shape)
        shape[self.split_dim] = 1
        channel = nn.functional.pad(log_det[:, None], (0, math.prod(shape[1:]) - 1)).view(shape)
        dtype = torch.promote_types(x.dtype, log_det.dtype)
        return torch.cat((x.to(dtype), channel.to(dtype)), self.split_dim)

    def apply(self, run: Callable[[Tensor], Tensor], streams: list[Tensor]) -> None:
        # Behind the streams are log-determinants of other steps.
        count, dim = len(self.inputs), self.split_dim
        x = self._join(streams[:count])
        if not is_traced():
            self._shape = x.shape
        x = run(x)
        if self.measures:
            x, channel = x.split((x.shape[dim] - 1, 1), dim)
            x = x.to(self._dtype or streams[0].dtype)
            streams.append(channel.flatten(1)[:, 0].clone())
        streams[:count] = self._split(x, streams[:count])

    def undo(self, again: Again, streams: list[Tensor]) -> None:
        x = again.repeat(self._join(streams), self._back)
        if self._shape is not None and x.shape != self._shape:
            raise ValueError(
                f"the way back through {type(self.branch).__name__} gives shape {tuple(x.shape)}, "
                f"but what it undoes was given {tuple(self._shape)}; mend its inverse, which "
                "revcore.check_invertible tries"
            )
        streams[:] = self._split(x, streams)

    def rebuild(self, again: Again, streams: list[Tensor], kept: Streams | None) -> Differentiate:
        # Not the streams, which would stay alive.
        zeros = [partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device) for x in streams]
        if kept is None:
            self.undo(again, streams)
        else:
            streams[:] = kept
        _, pull = again.record(self._join(streams))
        return partial(self._differentiate, tuple(streams), zeros, pull)

    def _differentiate(
        self,
        like: Sequence[Tensor],
        zeros: Sequence[Callable[[], Tensor]],
        pull: Pullback,
        grads: Gradients,
    ) -> Sequence[Tensor | None]:
        count, grad = len(like), None
        if any(each is not None for each in grads):
            every = zip(grads, zeros, strict=False)
            grad = self._join([make() if each is None else each for each, make in every])
        of_log_det = grads.pop() if self.measures else None
        if self.measures and grad is not None:
            grad = self._pack(grad, grad.new_zeros(len(grad)) if of_log_det is None else of_log_det)
        grad_x, *found = pull(grad)
        grads[:count] = [None] * count if grad_x is None else self._split(grad_x, like)
        return found

    def _join(self, streams: Sequence[Tensor]) -> Tensor:
        return streams[0] if len(streams) == 1 else torch.cat(tuple(streams), self.split_dim)

    def _split(self, x: Tensor, like: Sequence[Tensor]) -> Streams:
        if len(like) == 1:
            return (lasting(dense(x)),)
        sizes = [stream.shape[self.split_dim] for stream in like]
        before, after = sum(sizes), x.shape[self.split_dim]
        if before == 0 or any(size * after % before for size in sizes):
            raise ValueError(
                f"{type(self.branch).__name__} made size {after} of size {before} along "
                f"split_dim={self.split_dim}, which cannot be split like the streams, of sizes "
                f"{sizes}"
            )
        parts = x.split([size * after // before for size in sizes], self.split_dim)
        # A part of a tensor has gaps, which a reconstructed stream has not.
        return tuple(part.contiguous() for part in parts)
