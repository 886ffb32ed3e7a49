"""MemCNN's names over ours: `import revcore.memcnn as memcnn` replaces `import memcnn`.

Signatures, results and the keys of state dicts are those of MemCNN 1.5.2. Where MemCNN was unsound
ours differs; docs/migration.md says how. New code should use the names of `revcore` itself.

References:
    MemCNN: A Python/PyTorch package for creating memory-efficient invertible neural networks
    (van de Leemput et al., 2019). https://doi.org/10.21105/joss.01576
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

import revcore
from revcore.arguments import Arguments, takes_gradient
from revcore.engine import thread
from revcore.snapshot import duplicate
from revcore.streams import Streams, as_streams

__all__ = [
    "AdditiveCoupling",
    "AffineAdapterNaive",
    "AffineAdapterSigmoid",
    "AffineCoupling",
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "create_coupling",
    "is_invertible_module",
]

Adapter = Callable[[nn.Module], nn.Module] | None


class AffineAdapterNaive(nn.Module):
    """Wraps a branch: scale `exp(f(x))`, shift `f(x)`."""

    adapt = staticmethod(revcore.exp_adapter)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.f = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.adapt(self.f(x))


class AffineAdapterSigmoid(AffineAdapterNaive):
    """Wraps a branch that doubles the channels: odd ones give the scale, even ones the shift."""

    adapt = staticmethod(revcore.sigmoid_adapter)


class AdditiveCoupling(revcore.AdditiveCoupling):
    """Creates MemCNN's additive coupling: `revcore.AdditiveCoupling` with branches `Fm` and `Gm`.

    Args:
        Fm: Module that reads the second stream.
        Gm: Module that reads the first; a deep copy of `Fm` by default.
        implementation_fwd: -1, 0 or 1, which all compute the same here.
        implementation_bwd: The same for the inverse.
        split_dim: Dimension along which the input is split.

    Raises:
        NotImplementedError: If an implementation is another number.
    """

    Fm: nn.Module
    Gm: nn.Module

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        split_dim: int = 1,
    ) -> None:
        super().__init__(Fm, copy.deepcopy(Fm) if Gm is None else Gm, split_dim)
        _name_like_memcnn(self, implementation_fwd, implementation_bwd)

    def half_steps(self) -> Sequence[revcore.HalfStep]:
        return (revcore.HalfStep(self, self.Fm, 0, 1), revcore.HalfStep(self, self.Gm, 1, 0))


class AffineCoupling(revcore.AffineCoupling):
    """Creates MemCNN's affine coupling, whose branches return scale and shift.

    Args:
        Fm: Module that reads the second stream.
        Gm: Module that reads the first; a deep copy of `Fm` by default.
        adapter: Class that wraps `Fm` and `Gm` in modules which return scale and shift; by default
            they do so themselves.
        implementation_fwd: -1, 0 or 1, which all compute the same here.
        implementation_bwd: The same for the inverse.
        split_dim: Dimension along which the input is split.

    Raises:
        NotImplementedError: If an implementation is another number.
    """

    Fm: nn.Module
    Gm: nn.Module

    def __init__(  # noqa: PLR0917 - MemCNN's arguments
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        adapter: Adapter = None,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        split_dim: int = 1,
    ) -> None:
        branches = (Fm, copy.deepcopy(Fm) if Gm is None else Gm)
        if adapter is not None:
            branches = (adapter(branches[0]), adapter(branches[1]))
        super().__init__(*branches, split_dim, adapter=_unstack)
        _name_like_memcnn(self, implementation_fwd, implementation_bwd)

    def half_steps(self) -> Sequence[revcore.HalfStep]:
        f, g = _Stacked(self.Fm), _Stacked(self.Gm)
        return (revcore.HalfStep(self, f, 0, 1), revcore.HalfStep(self, g, 1, 0))


class _Stacked(nn.Module):
    """A branch that returns scale and shift, as one that returns a tensor."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.branch(x))


def _unstack(t: Tensor) -> tuple[Tensor, Tensor]:
    return t[0], t[1]


def _name_like_memcnn(coupling: revcore.Coupling, forward: int, backward: int) -> None:
    for name, value in (("implementation_fwd", forward), ("implementation_bwd", backward)):
        if value not in (-1, 0, 1):
            raise NotImplementedError(f"{name} (={value}) must be -1, 0 or 1")
        setattr(coupling, name, value)
    # In MemCNN's order, in which optimizers count the parameters.
    modules = coupling._modules
    modules["Gm"], modules["Fm"] = modules.pop("g"), modules.pop("f")


class InvertibleModuleWrapper(revcore.ReversibleBlock):
    """Wraps a module with `forward` and `inverse`, which then keeps no activations.

    Around a coupling it is a `revcore.ReversibleBlock`: in a `revcore.ReversibleSequential` it
    keeps not even its output. Other modules may map several tensors to several.

    Args:
        fn: A coupling, or any module with a method `inverse`.
        keep_input: Whether to keep the input of `forward` rather than to reconstruct it.
        keep_input_inverse: The same for the input of `inverse`.
        num_bwd_passes: Not needed any more: backward may be repeated as often as the graph is
            retained.
        disable: Whether to store activations as plain autograd does.
        preserve_rng_state: Not needed any more: random numbers are always replayed.
    """

    _wraps = nn.Module
    _key = "_fn"
    coupling = property(lambda self: self._fn)

    def __init__(  # noqa: PLR0917 - MemCNN's arguments
        self,
        fn: nn.Module,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        num_bwd_passes: int = 1,
        disable: bool = False,
        preserve_rng_state: bool = False,
    ) -> None:
        make: Callable[..., Any] = lambda *_, **__: fn  # noqa: E731
        super().__init__(fn, fn, make, getattr(fn, "split_dim", 1), keep_input, keep_input_inverse)
        self._modules["_fn"] = self._modules.pop("coupling")
        self.num_bwd_passes, self.preserve_rng_state = num_bwd_passes, preserve_rng_state
        self.disable = disable

    @property
    def disable(self) -> bool:
        """Whether activations are stored; the opposite of `reversing`."""
        return not self.reversing

    @disable.setter
    def disable(self, value: bool) -> None:
        self.reversing = not value

    @property
    def streams(self) -> int:
        """How many streams a single input tensor is split in."""
        return getattr(self._fn, "streams", 1)

    def _map(self, x: Streams, kwargs: Arguments, *, inverted: bool) -> Tensor | Streams:
        # In a chain it is a step as any module with an inverse.
        if isinstance(self._fn, revcore.Coupling) or thread.call is not None:
            return super()._map(x, kwargs, inverted=inverted)
        if not self.reversing:
            plain: Any = self._fn.inverse if inverted else self._fn
            return plain(*x, **kwargs)  # type: ignore[no-any-return]
        if not all(map(takes_gradient, x)):
            kinds = ", ".join(str(tensor.dtype) for tensor in x)
            raise TypeError(
                f"tensors must be of floating point to be reversed, got {kinds}; pass others by "
                "keyword, or set disable=True"
            )
        packed = _Packed(self._fn, x, inverted=inverted)
        if self._keeps(inverted=inverted):
            joined = revcore.recompute(packed, _pack(x), **kwargs)
        else:
            joined = revcore.ReversibleSequential(packed, split_dim=-1)(_pack(x), **kwargs)
        y = _unpack(joined, packed.after)
        return y[0] if len(y) == 1 else y


class _Packed(nn.Module):
    """One call of a module of several tensors, as a module of one tensor."""

    def __init__(self, fn: Any, x: Streams, *, inverted: bool = False) -> None:
        super().__init__()
        self.fn = fn
        self.ways = (fn.inverse, fn) if inverted else (fn, fn.inverse)
        self.before = [(tensor.shape, tensor.dtype) for tensor in x]

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y = as_streams(self.ways[0](*_unpack(x, self.before), **kwargs))
        self.after = [(tensor.shape, tensor.dtype) for tensor in y]
        return _pack(y)

    def inverse(self, y: Tensor, **kwargs: Any) -> Tensor:
        return _pack(as_streams(self.ways[1](*_unpack(y, self.after), **kwargs)))


def _pack(x: Streams) -> Tensor:
    return x[0] if len(x) == 1 else torch.cat([tensor.flatten() for tensor in x])


def _unpack(x: Tensor, kinds: Sequence[tuple[Size, torch.dtype]]) -> Streams:
    if len(kinds) == 1:
        return (x,)
    parts = x.split([shape.numel() for shape, _ in kinds])
    # Joined, they had the best precision of all.
    return tuple(p.view(shape).to(dtype) for p, (shape, dtype) in zip(parts, kinds, strict=True))


class ReversibleBlock(InvertibleModuleWrapper):
    """Creates MemCNN's reversible block: a coupling by name, in an `InvertibleModuleWrapper`.

    Args:
        Fm: Module that reads the second stream.
        Gm: Module that reads the first; a deep copy of `Fm` by default.
        coupling: `"additive"` or `"affine"`.
        keep_input: Whether to keep the input of `forward` rather than to reconstruct it.
        keep_input_inverse: The same for the input of `inverse`.
        implementation_fwd: -1, 0 or 1, which all compute the same here.
        implementation_bwd: The same for the inverse.
        adapter: For the affine coupling; see `AffineCoupling`.

    Raises:
        NotImplementedError: If a coupling or an implementation is unknown.

    Example:
        >>> block = ReversibleBlock(nn.Linear(4, 4), coupling="additive", keep_input=True)
        >>> block(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(  # noqa: PLR0917 - MemCNN's arguments
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        coupling: str = "additive",
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        implementation_fwd: int = -1,
        implementation_bwd: int = -1,
        adapter: Adapter = None,
    ) -> None:
        fn = create_coupling(Fm, Gm, coupling, implementation_fwd, implementation_bwd, adapter)
        super().__init__(fn, keep_input, keep_input_inverse)


def create_coupling(  # noqa: PLR0917 - MemCNN's arguments
    Fm: nn.Module,
    Gm: nn.Module | None = None,
    coupling: str = "additive",
    implementation_fwd: int = -1,
    implementation_bwd: int = -1,
    adapter: Adapter = None,
) -> AdditiveCoupling | AffineCoupling:
    """Creates an `AdditiveCoupling` or `AffineCoupling` by name; see `ReversibleBlock`."""
    if coupling == "additive":
        return AdditiveCoupling(Fm, Gm, implementation_fwd, implementation_bwd)
    if coupling == "affine":
        return AffineCoupling(Fm, Gm, adapter, implementation_fwd, implementation_bwd)
    raise NotImplementedError(f"coupling={coupling!r} is unknown; use 'additive' or 'affine'")


def is_invertible_module(
    module_in: nn.Module,
    test_input_shape: Sequence[Any],
    test_input_dtype: torch.dtype = torch.float32,
    atol: float = 1e-6,
    random_seed: int = 42,
) -> bool:
    """Tells whether forward and inverse undo each other; `revcore.check_invertible` says more.

    It warns where they return a tensor that they were given, or one tensor twice.

    Args:
        module_in: A module, which is left as it was.
        test_input_shape: Shape of the input, or shapes of several.
        test_input_dtype: Their type.
        atol: Absolute tolerance.
        random_seed: Seed of the input.

    Raises:
        ValueError: If `test_input_shape` is not one shape or several.
    """
    fn: Any = module_in._fn if isinstance(module_in, InvertibleModuleWrapper) else module_in
    if not hasattr(fn, "inverse"):
        return False
    try:
        several = not all(isinstance(size, int) for size in test_input_shape)
        shapes = [Size(shape) for shape in (test_input_shape if several else [test_input_shape])]
    except TypeError:
        raise ValueError(
            f"test_input_shape (={test_input_shape!r}) must be a shape, or shapes, of integers"
        ) from None
    random = torch.Generator().manual_seed(random_seed)
    fn = duplicate(fn)
    device = next(fn.parameters(), torch.empty(0)).device
    draw = partial(torch.rand, dtype=test_input_dtype, generator=random)
    with torch.no_grad():
        x = tuple(draw(shape).to(device) for shape in shapes)
        y = as_streams(fn(*x))
        back = as_streams(fn.inverse(*y))
        again = as_streams(fn(*back))
    for way, tensors in (("forward", x + y), ("inverse", y + back)):
        if len(set(map(id, tensors))) < len(tensors):
            warnings.warn(f"{way} returns its input, or a tensor twice", UserWarning, stacklevel=2)
    pairs = zip(x + y, back + again, strict=True)
    return all(torch.allclose(found, given, atol=atol) for given, found in pairs)
