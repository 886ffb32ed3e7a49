"""Any module with `forward` and `inverse`, as a step of a chain."""

from __future__ import annotations

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

    def __init__(
        self, module: nn.Module, count: int, split_dim: int, *, inverted: bool = False
    ) -> None:
        self.branch = module
        self.reads = self.writes = tuple(range(count))
        self.split_dim = split_dim
        self.inverted = inverted

    @property
    def call(self) -> Callable[..., Tensor]:
        return self._directions()[self.inverted]

    def _directions(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        return self.branch, self.branch.inverse  # type: ignore[return-value]

    def inverse(self) -> InvertibleStep:
        return InvertibleStep(
            self.branch, len(self.reads), self.split_dim, inverted=not self.inverted
        )

    def apply(self, run: Run, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._split(run(self._join(streams)), streams)

    def undo(self, replay: Replay, streams: list[Tensor]) -> None:
        back = self._directions()[not self.inverted]
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
        grad_x, *grad_leaves = graph.differentiate(needed, self._join(grads), self.branch)
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
        if self.inverted:
            raise RuntimeError(
                f"the inverse of {type(self.branch).__name__} cannot be compiled in a chain; call "
                "chain.inverse outside of torch.compile"
            )
        if kept is None:
            kept = self._split(self._directions()[1](self._join(streams)), streams)
        streams[:] = kept
        _, pullback, *_ = torch.func.vjp(function, self._join(streams), *leaves)
        grad_x, *found = pullback(self._join(grads))
        grads[:] = self._split(grad_x, streams)
        return tuple(found)

    def _join(self, streams: Sequence[Tensor]) -> Tensor:
        return streams[0] if len(streams) == 1 else torch.cat(tuple(streams), self.split_dim)

    def _split(self, x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(like) == 1:
            return (x,)
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
