"""A reversible block: a coupling that keeps no activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from revcore.additive import AdditiveCoupling
from revcore.affine import AffineCoupling
from revcore.coupling import Coupling
from revcore.engine import Call, run
from revcore.fixed_point import FixedPointCoupling
from revcore.hooks import has_hooks
from revcore.reversible import Reversible
from revcore.step import Step
from revcore.streams import Streams, as_dim, as_streams

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
            `split_dim` no integer.
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
        return self.coupling.streams

    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        refuse_hidden_code(self.coupling)
        steps = self.coupling._steps(inverted=inverted)
        return list(steps), [0] if self._keeps(inverted=inverted) else []

    def _run(
        self, call: Call, streams: Streams, kwargs: dict[str, Any], *, inverted: bool
    ) -> Streams:
        coupling = self.coupling
        if self._keeps(inverted=inverted):
            call.keep(streams)
        if coupling_of(coupling) is None:
            return as_streams((coupling.inverse if inverted else coupling)(*streams, **kwargs))
        return run(coupling._steps(inverted=inverted), streams, kwargs)

    def _keeps(self, *, inverted: bool) -> bool:
        return self.keep_input_inverse if inverted else self.keep_input

    def extra_repr(self) -> str:
        return (
            f"split_dim={self.split_dim}, keep_input={self.keep_input}, "
            f"keep_input_inverse={self.keep_input_inverse}, reversing={self.reversing}"
        )


def coupling_of(block: nn.Module) -> Coupling | None:
    """Returns the coupling of a block that nobody would see being called, else None."""
    # Hooks run when a module is called (FSDP has some), and so does what compile() made of it.
    if block._compiled_call_impl is not None or "forward" in vars(block) or has_hooks(block):
        return None
    kind: Any = type(block)
    if kind is ReversibleBlock:
        return coupling_of(block._modules["coupling"])  # type: ignore[arg-type]
    return block if isinstance(block, Coupling) and _has_usual_ways(kind) else None


def _has_usual_ways(kind: type[Coupling]) -> bool:
    return kind.forward is Coupling.forward and kind.inverse is Coupling.inverse


def refuse_hidden_code(module: nn.Module) -> None:
    """Raises if a module does more than a compiled chain, which runs its steps alone, would see."""
    if isinstance(module, Coupling) and not _has_usual_ways(type(module)):
        raise RuntimeError(
            f"{type(module).__name__} has a forward or inverse of its own, which does not run in a "
            "compiled chain: let it list half_steps instead, or compile its branches"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(
            f"{type(module).__name__} has a forward hook, which does not run in a compiled chain: "
            "remove it, or hook a branch or the chain"
        )
