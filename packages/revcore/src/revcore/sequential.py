"""A chain of reversible blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from revcore.block import parts_of
from revcore.coupling import Coupling
from revcore.parts import Part
from revcore.reversible import Reversible
from revcore.streams import as_dim

_OURS = (Reversible, Coupling)


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
        # A wrapper (torch.compile makes one) sees the streams joined, and its block splits them.
        inner = getattr(module.inverse, "__self__", None)
        # 1 is the default, which a block in a chain need not repeat.
        usual = (1, self.split_dim) if inner is module else (self.split_dim,)
        if isinstance(inner, _OURS) and inner.split_dim not in usual:
            raise ValueError(
                f"block {name} splits along split_dim={inner.split_dim} and the chain along "
                f"split_dim={self.split_dim}; make them the same"
            )
        if getattr(module, "log_det", False) is True and not self.log_det:
            raise ValueError(f"block {name} has log_det=True, so the chain needs log_det=True too")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or name in vars(self).get("_modules", ()):
            self._check(name, value)
        super().__setattr__(name, value)

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
        blocks = list(self)[index]
        part = ReversibleSequential(*blocks, split_dim=self.split_dim, log_det=self.log_det)
        part.reversing, part.overlap = self.reversing, self.overlap
        return part

    @property
    def streams(self) -> int:
        """How many streams a single input tensor is split in: as many as the couplings have."""
        # A list, because older Dynamos cannot trace max(..., default=1).
        return max([1, *[block.streams for block in self if isinstance(block, _OURS)]])

    def _parts(self, count: int, split_dim: int, *, inverted: bool) -> list[Part]:
        return [
            part
            for block in list(self)[:: -1 if inverted else 1]
            for part in parts_of(block, count, split_dim, inverted=inverted)
        ]

    def extra_repr(self) -> str:
        kept = sum(bool(getattr(block, "keep_input", False)) for block in self)
        stores = f"output and {kept} kept inputs" if self.reversing else "all activations"
        return (
            f"split_dim={self.split_dim}, reversing={self.reversing}, blocks={len(self)}, "
            f"stores={stores!r}"
        )
