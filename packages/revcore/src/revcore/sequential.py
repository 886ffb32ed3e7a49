"""What people write: a reversible block, and a chain of them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revcore.additive import AdditiveCoupling
from revcore.affine import AffineCoupling
from revcore.arguments import tensors_of
from revcore.compiled import WAYS, find_fault, run_compiled
from revcore.coupling import Coupling
from revcore.engine import is_apart, keep, reverse, run
from revcore.fixed_point import FixedPointCoupling
from revcore.hooks import has_global_hooks, has_hooks
from revcore.invertible import InvertibleStep
from revcore.known import is_known
from revcore.step import Step
from revcore.streams import Streams, join, split, with_log_det

_COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "additive": AdditiveCoupling,
    "affine": AffineCoupling,
    "fixed_point": FixedPointCoupling,
}

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)


def _constant(method: F) -> F:
    """Does what torch._dynamo.assume_constant_result does, without its import, of seconds."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


@_constant
def _can_reverse_compiled() -> bool:
    """Tells whether a node of our own can be traced: not for export, nor inside of a transform."""
    exporting = getattr(torch.compiler, "is_exporting", bool)()
    return not exporting and torch._C._functorch.peek_interpreter_stack() is None


class _Reversible(nn.Module):
    """What a block and a chain share: two directions, reversed or stored, compiled or not.

    Attributes:
        reversing: Whether to reverse (True) or store activations as plain autograd does.
        overlap: Whether a CUDA graph that is captured rebuilds each half-step while the one after
            it is differentiated, on a second stream: faster, with the memory of one more half-step.
        split_dim: Dimension along which a single input tensor is split.
        log_det: Whether to return the log-determinant too.
    """

    reversing: bool
    overlap: bool
    split_dim: int
    log_det: bool = False

    def forward(self, *x: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps one tensor to one tensor, or streams to a tuple of as many.

        Args:
            x: One tensor, which is split in equal parts along `split_dim`, or the streams, which
                may be of any sizes that the branches fit.
            kwargs: Passed to every branch. Tensors among them get their gradients.

        Returns:
            A tensor like the input, or a tuple of streams. With `log_det`, log |det J| of each
            sample comes behind it, of shape (batch,): `z, log_det = chain(x)`.

        Raises:
            ValueError: If a single tensor cannot be split in equal streams.
        """
        if torch.compiler.is_compiling():
            return self._compiled(x, kwargs, inverted=False)
        return reverse(self, self._forward, x, kwargs)

    def inverse(self, *y: Tensor, **kwargs: Any) -> Tensor | Streams:
        """Maps the output of `forward` back to its input, up to rounding.

        Takes, returns and raises what `forward` does, and keeps no activations either. The
        log-determinant is that of the inverse.
        """
        if torch.compiler.is_compiling():
            return self._compiled(y, kwargs, inverted=True)
        return reverse(self, self._inverse, y, kwargs)

    @property
    @abstractmethod
    def streams(self) -> int:
        """How many streams a single input tensor is split in."""

    @abstractmethod
    def _forward(self, *streams: Tensor, **kwargs: Any) -> Streams:
        """Runs all steps, by the eager engine."""

    @abstractmethod
    def _inverse(self, *streams: Tensor, **kwargs: Any) -> Streams:
        """Undoes all steps, by the eager engine."""

    @abstractmethod
    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        """Lists the steps for so many streams, and the numbers of those whose input is kept."""

    def _compiled(
        self, x: tuple[Tensor, ...], kwargs: dict[str, Any], *, inverted: bool
    ) -> Tensor | Streams:
        streams = split(x, self.split_dim, self.streams)
        steps, kept = self._plan(len(streams), inverted=inverted)
        reversing = self.reversing and torch.is_grad_enabled() and _can_reverse_compiled()
        if reversing and len(tensors_of(kwargs)) > sum(
            isinstance(v, Tensor) for v in kwargs.values()
        ):
            raise RuntimeError(
                "a compiled chain takes tensors as arguments, but none inside of lists, tuples or "
                "dicts; pass each by a keyword of its own"
            )
        if reversing and not self._is_known():
            names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
            constants = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
            tensors = [*streams, *(kwargs[name] for name in names)]
            # By way of text, because only constants can be passed, and a size that has been another
            # one before is a symbol, which stays one under int() alone.
            shapes = [[int(f"{size}") for size in tensor.shape] for tensor in tensors]
            dtypes = [tensor.dtype for tensor in tensors]
            device = str(tensors[0].device)
            fault = self._find_fault(inverted, shapes, dtypes, device, names, constants=constants)
            if fault:
                raise RuntimeError(fault)
        if self.log_det:
            steps = [step.measured() for step in steps]
        outputs = run_compiled(steps, kept, streams, kwargs, reversing=reversing)
        y = join(x, outputs[: len(streams)], self.split_dim)
        return with_log_det(y, outputs[len(streams) :]) if self.log_det else y

    # Both run once, in Python, while Dynamo traces, which takes their results for constants.
    @_constant
    def _is_known(self) -> bool:
        """Tells whether branches are made of torch's own modules, and have all parameters."""
        steps, _ = self._plan(self.streams, inverted=False)
        modules = [module for step in steps for module in step.branch.modules()]
        held = {parameter for step in steps for parameter in step.branch.parameters()}
        return all(map(is_known, modules)) and held.issuperset(self.parameters())

    @_constant
    def _find_fault(
        self,
        inverted: bool,
        shapes: list[list[int]],
        dtypes: list[torch.dtype],
        device: str,
        names: list[str],
        *,
        constants: dict[str, Any],
    ) -> str:
        steps, _ = self._plan(len(shapes) - len(names), inverted=inverted)
        modules = (module for step in steps for module in step.branch.modules())
        if any(isinstance(module, _Reversible) for module in modules):
            return f"a chain inside of a branch cannot be compiled with the one around it. {WAYS}"
        return find_fault(steps, shapes, dtypes, device, names, constants=constants)


_OURS = (_Reversible, Coupling)

# A node of autograd takes some ten microseconds, which show where there is little to compute, so
# several blocks share one. It holds the gradients of its streams and parameters until it is done,
# which would show if there were many.
_STEPS_AT_ONCE = 16
_SMALL = 2**23  # bytes of all streams
_TINY = 2**10  # bytes of a block's parameters

_nbytes: Callable[[Tensor], int] = attrgetter("nbytes")
_requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


class ReversibleBlock(_Reversible):
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

    split_dim: int

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
        self.coupling = coupling(f, copy.deepcopy(f) if g is None else g, split_dim=split_dim)
        self.split_dim = split_dim
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse
        self.reversing = self.overlap = True

    @property
    def streams(self) -> int:
        """How many streams a single input tensor is split in."""
        return self.coupling.streams

    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        _refuse_hooks(self.coupling)
        if inverted:
            steps, keep_input = self.coupling.inverse_half_steps(), self.keep_input_inverse
        else:
            steps, keep_input = self.coupling.half_steps(), self.keep_input
        return list(steps), [0] if keep_input else []

    def _forward(self, *streams: Tensor, **kwargs: Any) -> Streams:
        if self.keep_input:
            keep(streams)
        if _coupling_of(self.coupling) is None:
            return _as_streams(self.coupling(*streams, **kwargs))
        return run(self.coupling.half_steps(), streams, kwargs)

    def _inverse(self, *streams: Tensor, **kwargs: Any) -> Streams:
        if self.keep_input_inverse:
            keep(streams)
        return _as_streams(self.coupling.inverse(*streams, **kwargs))

    def extra_repr(self) -> str:
        return (
            f"split_dim={self.split_dim}, keep_input={self.keep_input}, "
            f"keep_input_inverse={self.keep_input_inverse}, reversing={self.reversing}"
        )


class ReversibleSequential(_Reversible, nn.Sequential):
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
        TypeError: If a block is not reversible; in a call, if it has no log-determinant.
        ValueError: If a block is made to split along another dimension.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> chain = ReversibleSequential(*(ReversibleBlock(nn.Linear(4, 4)) for _ in range(3)))
        >>> chain(torch.randn(2, 8)).shape
        torch.Size([2, 8])
        >>> y1, y2 = chain(torch.randn(2, 4), torch.randn(2, 4))
        >>> y1.shape
        torch.Size([2, 4])
    """

    split_dim: int
    reversing: bool
    overlap: bool

    def __init__(self, *blocks: nn.Module, split_dim: int = 1, log_det: bool = False) -> None:
        self.split_dim = split_dim
        self.log_det = log_det
        self.reversing = self.overlap = True
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
        part: ReversibleSequential = self[:]
        for block in other:
            part.append(block)
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
        # A plain loop, because older Dynamos cannot trace max(..., default=1).
        count = 1
        for block in self:
            if isinstance(block, _OURS) and block.streams > count:
                count = block.streams
        return count

    def _plan(self, count: int, *, inverted: bool) -> tuple[list[Step], list[int]]:
        steps: list[Step] = []
        kept: list[int] = []
        for block in reversed(list(self)) if inverted else self:
            _refuse_hooks(block)
            if isinstance(block, _Reversible):
                own, own_kept = block._plan(count, inverted=inverted)
            elif isinstance(block, Coupling):
                own_kept = []
                own = list(block.inverse_half_steps() if inverted else block.half_steps())
            else:
                own_kept = []
                own = [InvertibleStep(block, count, self.split_dim, inverted=inverted)]
            kept += [len(steps) + number for number in own_kept]
            steps += own
        return steps, kept

    def _forward(self, *streams: Tensor, **kwargs: Any) -> Streams:
        return self._run(streams, kwargs, inverted=False)

    def _inverse(self, *streams: Tensor, **kwargs: Any) -> Streams:
        return self._run(streams, kwargs, inverted=True)

    def _run(self, streams: Streams, kwargs: dict[str, Any], *, inverted: bool) -> Streams:
        blocks: list[Any] = list(self)
        if inverted:
            blocks.reverse()
        # A shared node holds one gradient of each argument for each of its steps, too.
        arguments = tensors_of(kwargs) if kwargs else []
        small = sum(map(_nbytes, streams)) <= _SMALL and not any(map(_requires_grad, arguments))
        hooked = has_global_hooks()
        inside = is_apart() and _writes_all(blocks[-1], len(streams)) if blocks else False
        steps: list[Step] = []
        for block in blocks:
            coupling = None if hooked else _coupling_of(block)
            kept = coupling not in (None, block) and _keeps(block, inverted=inverted)
            # With a node of its own for the last block, the peak is the same at any depth: only
            # the first gradients may take no memory, as those of a sum.
            shares = (
                coupling is not None and small and block is not blocks[-1] and _is_tiny(coupling)
            )
            if steps and (kept or not shares or len(steps) >= _STEPS_AT_ONCE):
                streams, steps = run(steps, streams, kwargs, inside=inside), []
            if kept:
                keep(streams)
            if coupling is not None:
                steps += coupling.inverse_half_steps() if inverted else coupling.half_steps()
            elif isinstance(block, _OURS):
                streams = _as_streams((block.inverse if inverted else block)(*streams, **kwargs))
            else:
                steps = [InvertibleStep(block, len(streams), self.split_dim, inverted=inverted)]
            if steps and not shares:
                within = inside and block is not blocks[-1]
                streams, steps = run(steps, streams, kwargs, inside=within), []
        return streams

    def extra_repr(self) -> str:
        kept = sum(bool(getattr(block, "keep_input", False)) for block in self)
        stores = f"output and {kept} kept inputs" if self.reversing else "all activations"
        return (
            f"split_dim={self.split_dim}, reversing={self.reversing}, blocks={len(self)}, "
            f"stores={stores!r}"
        )


def _writes_all(block: nn.Module, count: int) -> bool:
    """Tells whether a block changes all streams; of what is not known, that it does not."""
    coupling = _coupling_of(block)
    if coupling is None:
        return not isinstance(block, _OURS)
    return len({index for step in coupling.half_steps() for index in step.writes}) == count


def _as_streams(y: Tensor | Streams) -> Streams:
    return y if isinstance(y, tuple) else (y,)


def _keeps(block: Any, *, inverted: bool) -> bool:
    return bool(block.keep_input_inverse if inverted else block.keep_input)


def _is_tiny(coupling: Coupling) -> bool:
    known: bool | None = coupling.__dict__.get("_tiny")
    if known is None:
        parameters = list(coupling.parameters())
        if any(map(is_lazy, parameters)):
            return False
        # Not looked at again: if it grows, some memory is held a little longer.
        known = coupling.__dict__["_tiny"] = sum(map(_nbytes, parameters)) <= _TINY
    return known


def _coupling_of(block: nn.Module) -> Coupling | None:
    """Returns the coupling of a block that nobody would see being called, else None."""
    if _is_seen(block):
        return None
    kind: Any = type(block)
    if kind is ReversibleBlock:
        return _coupling_of(block._modules["coupling"])  # type: ignore[arg-type]
    return block if isinstance(block, Coupling) and _has_usual_ways(kind) else None


def _has_usual_ways(kind: type[Coupling]) -> bool:
    return kind.forward is Coupling.forward and kind.inverse is Coupling.inverse


def _refuse_hooks(module: nn.Module) -> None:
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


def _is_seen(module: nn.Module) -> bool:
    # Hooks run when a module is called (FSDP has some), and so does what compile() made of it.
    compiled = module._compiled_call_impl is not None
    return compiled or "forward" in module.__dict__ or has_hooks(module)


def set_reversing(module: M, enabled: bool) -> M:
    """Makes every reversible block and chain in a module reverse, or store its activations.

    Both modes have the same state dict, and compute the same bits in the forward pass unless a
    branch takes other kernels without gradients, as `nn.MultiheadAttention` does in evaluation.
    Storing is faster and takes memory in proportion to depth; it allows what reversing cannot do,
    such as double backward.

    Args:
        module: Any module.
        enabled: True to reverse, False to store activations as plain autograd does.

    Returns:
        The same module.

    Example:
        >>> from torch import nn
        >>> block = set_reversing(ReversibleBlock(nn.Linear(4, 4)), False)
        >>> block.reversing
        False
    """
    for part in module.modules():
        if isinstance(part, _Reversible):
            part.reversing = enabled
    return module
