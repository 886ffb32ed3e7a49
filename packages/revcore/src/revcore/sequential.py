"""A chain of reversible blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore.block import coupling_of, refuse_hidden_code
from revcore.coupling import Coupling
from revcore.engine import Call, run
from revcore.hooks import has_global_hooks
from revcore.invertible import InvertibleStep
from revcore.reversible import Reversible
from revcore.step import Step
from revcore.streams import Streams, as_dim, as_streams

_OURS = (Reversible, Coupling)

# A node of autograd takes some ten microseconds, which show where there is little to compute, so
# several blocks share one. It holds the gradients of its streams and parameters until it is done,
# which would show if there were many.
_STEPS_AT_ONCE = 64
_SMALL = 2**23  # bytes of all streams
_TINY = 2**10  # bytes of a block's parameters

_nbytes: Callable[[Tensor], int] = attrgetter("nbytes")
_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


class ReversibleSequential(Reversible, nn.Sequential):
    """Creates a chain of reversible blocks whose memory does not grow with its length.

    The streams stay apart between the blocks. The chain's own `split_dim` says how its input is
    split; that of the blocks is not used.

    References:
        The Reversible Residual Network: Backpropagation Without Storing Activations
        (Gomez et al., 2017). https://arxiv.org/abs/1707.04585

    Args:
        blocks: In the order of the forward pass: `ReversibleBlock`s, couplings, other chains, and
            any modules with a method `inverse(y)`, which gives `x` for `y = module(x)`. Those see
            the streams joined in one tensor, along `split_dim`.
        split_dim: Dimension along which a single input tensor is split in equal streams; two, if
            the couplings do not say otherwise.
        log_det: Whether calls return, behind the output, the log-determinant of the Jacobian for
            each sample, as a normalizing flow needs it. All blocks must have one: couplings by
            `log_det(a, t)`, other modules by a method `log_det(x)`. Of an inner chain, that of the
            outer one decides.

    Attributes:
        reversing: Whether the chain reverses (True) or stores activations as plain autograd does.
            See `set_reversing`.
        overlap: Whether a CUDA graph that is captured rebuilds each half-step while the one after
            it is differentiated, on a second stream: faster, with the memory of one more half-step.

    Raises:
        TypeError: If a block is not reversible, or `split_dim` no integer; in a call, if a block
            has no log-determinant.
        ValueError: If a block is made to split along another dimension.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revcore import ReversibleBlock
        >>> chain = ReversibleSequential(*(ReversibleBlock(nn.Linear(4, 4)) for _ in range(3)))
        >>> chain(torch.randn(2, 8)).shape
        torch.Size([2, 8])
        >>> y1, y2 = chain(torch.randn(2, 4), torch.randn(2, 4))
        >>> y1.shape
        torch.Size([2, 4])
    """

    def __init__(self, *blocks: nn.Module, split_dim: int = 1, log_det: bool = False) -> None:
        self.split_dim = as_dim(split_dim)
        self.log_det = log_det
        super().__init__(*blocks)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a block; the constructor and `append` come here."""
        self._check(name, module)
        super().add_module(name, module)

    def _check(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, nn.Module) or not callable(getattr(module, "inverse", None)):
            raise TypeError(
                f"block {name} is a {type(module).__name__}, which cannot be reversed; wrap it, "
                "ReversibleBlock(module), or give it a method inverse(y)"
            )
        # 1 is the default, which a block in a chain need not repeat.
        if isinstance(module, _OURS) and module.split_dim not in (1, self.split_dim):
            raise ValueError(
                f"block {name} splits along split_dim={module.split_dim} and the chain along "
                f"split_dim={self.split_dim}; give the chain split_dim={module.split_dim}"
            )
        if getattr(module, "log_det", False) is True and not self.log_det:
            raise ValueError(f"block {name} has log_det=True, so the chain needs log_det=True too")

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._check(str(index), module)
        super().__setitem__(index, module)

    def insert(self, index: int, module: nn.Module) -> ReversibleSequential:
        """Inserts a block."""
        self._check(str(index), module)
        super().insert(index, module)
        return self

    def __add__(self, other: Iterable[nn.Module]) -> ReversibleSequential:
        """Returns a chain of these blocks and others, which share parameters."""
        part: ReversibleSequential = self[:].extend(other)
        return part

    def __mul__(self, other: int) -> ReversibleSequential:
        """Returns a chain of these blocks so many times over."""
        part: ReversibleSequential = self[:]
        part *= other
        return part

    def __getitem__(self, index: slice | int) -> Any:
        """Returns a block, or for a slice the chain of those blocks, which share parameters."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = type(self)(*list(self)[index], split_dim=self.split_dim, log_det=self.log_det)
        part.reversing, part.overlap = self.reversing, self.overlap
        return part

    @property
    def streams(self) -> int:
        """How many streams a single input tensor is split in: as many as the couplings have."""
        # A list, because older Dynamos cannot trace max(..., default=1).
        return max([1, *[block.streams for block in self if isinstance(block, _OURS)]])

    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        steps: list[Step] = []
        kept: list[int] = []
        for block in reversed(list(self)) if inverted else self:
            refuse_hidden_code(block)
            own_kept: list[int] = []
            if isinstance(block, Reversible):
                own, own_kept = block._plan(count, inverted=inverted)
            elif isinstance(block, Coupling):
                own = list(block._steps(inverted=inverted))
            else:
                own = [InvertibleStep(block, count, self.split_dim, inverted=inverted)]
            kept += [len(steps) + number for number in own_kept]
            steps += own
        return steps, kept

    def _run(
        self, call: Call, streams: Streams, kwargs: dict[str, Any], *, inverted: bool
    ) -> Streams:
        blocks: list[Any] = list(self)[:: -1 if inverted else 1]
        # A shared node holds one gradient of each argument for each of its steps, too.
        small = sum(map(_nbytes, streams)) <= _SMALL and not any(map(_requires_grad, call.given))
        hooked = has_global_hooks()
        steps: list[Step] = []
        for block in blocks:
            coupling = None if hooked else coupling_of(block)
            kept = coupling not in (None, block) and block._keeps(inverted=inverted)
            # With a node of its own for the last block, the peak is the same at any depth: only
            # the first gradients may take no memory, as those of a sum.
            shares = (
                coupling is not None and small and block is not blocks[-1] and _is_tiny(coupling)
            )
            if steps and (kept or not shares or len(steps) >= _STEPS_AT_ONCE):
                streams, steps = run(steps, streams, kwargs), []
            if kept:
                call.keep(streams)
            if coupling is not None:
                steps += coupling._steps(inverted=inverted)
            elif isinstance(block, _OURS):
                streams = as_streams((block.inverse if inverted else block)(*streams, **kwargs))
            else:
                steps = [InvertibleStep(block, len(streams), self.split_dim, inverted=inverted)]
            if steps and not shares:
                streams, steps = run(steps, streams, kwargs), []
        return streams

    def extra_repr(self) -> str:
        kept = sum(bool(getattr(block, "keep_input", False)) for block in self)
        stores = f"output and {kept} kept inputs" if self.reversing else "all activations"
        return (
            f"split_dim={self.split_dim}, reversing={self.reversing}, blocks={len(self)}, "
            f"stores={stores!r}"
        )


def _is_tiny(coupling: Coupling) -> bool:
    known: bool | None = coupling.__dict__.get("_tiny")
    if known is None:
        parameters = list(coupling.parameters())
        if any(map(is_lazy, parameters)):
            return False
        # Not looked at again: if it grows, some memory is held a little longer.
        known = coupling.__dict__["_tiny"] = sum(map(_nbytes, parameters)) <= _TINY
    return known
