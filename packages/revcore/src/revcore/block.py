"""A reversible block: a coupling that keeps no activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from revcore.additive import AdditiveCoupling
from revcore.affine import AffineCoupling
from revcore.coupling import Coupling
from revcore.fixed_point import FixedPointCoupling
from revcore.hooks import HOOKS, has_global_hooks, has_hooks
from revcore.invertible import InvertibleStep
from revcore.parts import Part
from revcore.reversible import Reversible
from revcore.streams import as_dim
from revcore.tracing import is_traced

_COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "additive": AdditiveCoupling,
    "affine": AffineCoupling,
    "fixed_point": FixedPointCoupling,
}


class ReversibleBlock(Reversible):
    """Creates a block that keeps no activations and reconstructs them in the backward pass.

    References:
        The Reversible Residual Network: Backpropagation Without Storing Activations
        (Gomez et al., 2017). https://arxiv.org/abs/1707.04585

    Args:
        f: Any module that keeps the shape of its input, which is one of the two streams.
        g: Another one, for the other stream. By default an independent deep copy of `f`.
        coupling: `"additive"`, `"affine"`, `"fixed_point"`, or a function
            `(f, g, split_dim=...) -> Coupling`, such as a subclass of `Coupling`.
        split_dim: Dimension along which a single input tensor is split in two equal streams.
        keep_input: Whether to keep the input of `forward`. A kept input is an anchor: a chain goes
            on from it exactly, which stops rounding errors from growing. It never changes what is
            computed, and may be set at any time.
        keep_input_inverse: The same for the input of `inverse`.

    Attributes:
        reversing: Whether the block reverses (True) or stores activations as plain autograd does.
            See `set_reversing`.

    Raises:
        TypeError: If `coupling` is neither a name nor a function that returns a `Coupling`, or
            `f` is a `Coupling` and there is no `g`, or `split_dim` is no integer.
        ValueError: If `coupling` is an unknown name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> block = ReversibleBlock(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        >>> x = torch.randn(2, 8)
        >>> y = block(x)
        >>> torch.allclose(block.inverse(y), x, atol=1e-5)
        True
    """

    _wraps: type[nn.Module] = Coupling
    _key = "coupling"

    def __init__(  # noqa: PLR0917 - the order of MemCNN's arguments
        self,
        f: nn.Module,
        g: nn.Module | None = None,
        coupling: str | Callable[..., Coupling] = "additive",
        split_dim: int = 1,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(f, Coupling) and g is None:
            raise TypeError(
                f"f is an {type(f).__name__}, which is a block already: use it as it is, or give "
                "this block its two branches"
            )
        if isinstance(coupling, str):
            if coupling not in _COUPLINGS:
                raise ValueError(
                    f"coupling={coupling!r} is unknown; use one of {sorted(_COUPLINGS)}, or a "
                    "subclass of Coupling"
                )
            coupling = _COUPLINGS[coupling]
        if isinstance(coupling, nn.Module) or not callable(coupling):
            raise TypeError(
                f"coupling must be a name, or a function (f, g, split_dim=...) -> Coupling, got "
                f"{type(coupling).__name__}; an object of a Coupling is a block already"
            )
        self.split_dim = as_dim(split_dim)
        made = coupling(f, copy.deepcopy(f) if g is None else g, split_dim=split_dim)
        if not isinstance(made, self._wraps):
            raise TypeError(
                f"coupling must be a function that returns a Coupling, but {coupling!r} returned "
                f"{type(made).__name__}"
            )
        self.coupling = made
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse

    @property
    def streams(self) -> int:
        """How many streams a single input tensor is split in."""
        streams: int = self._coupling.streams
        return streams

    @property
    def _coupling(self) -> Any:
        # nn.Module.__getattr__ takes half a microsecond, in each pass.
        return self._modules[self._key]

    def _parts(self, count: int, split_dim: int, *, inverted: bool) -> list[Part]:
        kept = self._keeps(inverted=inverted)
        return parts_of(self._coupling, count, split_dim, inverted=inverted, kept=kept)

    def _keeps(self, *, inverted: bool) -> bool:
        return self.keep_input_inverse if inverted else self.keep_input

    def extra_repr(self) -> str:
        return (
            f"split_dim={self.split_dim}, keep_input={self.keep_input}, "
            f"keep_input_inverse={self.keep_input_inverse}, reversing={self.reversing}"
        )


def parts_of(
    block: Any, count: int, split_dim: int, *, inverted: bool, kept: bool = False
) -> list[Part]:
    """Lists how a block of a chain runs: a chain or block, a coupling, or any other module.

    Args:
        block: The block.
        count: The number of streams.
        split_dim: Dimension along which they are joined for a module that knows nothing of them.
        inverted: Whether this is the way back.
        kept: Whether the input is kept.
    """
    if isinstance(block, Reversible):
        if _is_watched(block, Reversible):
            return [Part(block, None, kept)]
        parts = block._parts(count, split_dim, inverted=inverted)
        return [parts[0]._replace(kept=True), *parts[1:]] if kept and parts else parts
    if isinstance(block, Coupling):
        watched = _is_watched(block, Coupling)
        return [Part(block, None if watched else block._steps(inverted=inverted), kept)]
    return [Part(block, [InvertibleStep(block, count, split_dim, inverted=inverted)], kept)]


def _is_watched(block: nn.Module, usual: Any) -> bool:
    """Tells whether calling a block does more than to run its steps, as the usual class does."""
    kind: Any = type(block)
    if not (kind.forward is usual.forward and kind.inverse is usual.inverse):
        return True
    if is_traced():
        return any(len(vars(block)[name]) > 0 for name in HOOKS) or "forward" in vars(block)
    # Hooks run when a module is called (FSDP has some), and so does what compile() made of it.
    replaced = block._compiled_call_impl is not None or "forward" in vars(block)
    return replaced or has_hooks(block) or has_global_hooks()
