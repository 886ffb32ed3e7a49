"""Other libraries, used as their documentation says, and torch's checkpointing.

They are imported when a chain is built: in a process where a crash does no harm.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.adapters import Adapter, CannotAskError, Net, Plain
from conformance.plain import ADDITIVE, AFFINE_EXP, Pair, PlainChain


class MemCNN(Adapter):
    """Couplings, each in an `InvertibleModuleWrapper`."""

    name = "memcnn"
    package = "memcnn"

    def affine(self) -> Adapter:
        other = copy.copy(self)
        other.formula = AFFINE_EXP
        return other

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        import memcnn  # noqa: PLC0415

        coupling = memcnn.AdditiveCoupling
        if self.formula is AFFINE_EXP:
            coupling = partial(memcnn.AffineCoupling, adapter=memcnn.AffineAdapterNaive)
        wrap = partial(
            memcnn.InvertibleModuleWrapper,
            keep_input=False,
            keep_input_inverse=False,
            num_bwd_passes=options.get("passes", 1),
            preserve_rng_state=options.get("random", False),
        )
        return nn.Sequential(*(wrap(coupling(f, g, split_dim=split_dim)) for f, g in pairs))

    def pairs(self, net: Net) -> list[Pair]:
        sides = [(block._fn.Fm, block._fn.Gm) for block in net]
        return [(f.f, g.f) for f, g in sides] if self.formula is AFFINE_EXP else sides

    def blocks(self, net: Net) -> list[nn.Module]:
        return list(net)

    def call(self, net: Net, x: Tensor, **kwargs: Tensor) -> Tensor:
        raise CannotAskError("its couplings take no further arguments")

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        for block in reversed(list(net)):
            y = block.inverse(y)
        return y

    def keep_inputs(self, net: Net) -> None:
        for block in list(net)[::2]:
            block.keep_input = True


class RevTorch(Adapter):
    """Blocks in a `ReversibleSequence`."""

    name = "revtorch"
    package = "revtorch"

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        import revtorch  # noqa: PLC0415

        random, passes = options.get("random", False), options.get("passes", 1)
        blocks = (
            revtorch.ReversibleBlock(f, g, split_along_dim=split_dim, fix_random_seed=random)
            for f, g in pairs
        )
        return revtorch.ReversibleSequence(
            nn.ModuleList(blocks), eagerly_discard_variables=passes == 1
        )

    def pairs(self, net: Net) -> list[Pair]:
        return [(block.f_block, block.g_block) for block in net.reversible_blocks]

    def blocks(self, net: Net) -> list[nn.Module]:
        return list(net.reversible_blocks)

    def call(self, net: Net, x: Tensor, **kwargs: Tensor) -> Tensor:
        raise CannotAskError("its blocks take no further arguments")

    def tap(self, net: Net, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        # Its blocks run without gradients inside the sequence, so there have to be two of them.
        parts = (net.reversible_blocks[: index + 1], net.reversible_blocks[index + 1 :])
        first, second = (type(net)(part) for part in parts)
        middle = first(x)
        return middle, second(middle)


def _affine(a: Tensor, t: Tensor) -> Tensor:
    return AFFINE_EXP.combine(a, t, 1)


def _affine_undone(a: Tensor, t: Tensor) -> Tensor:
    return AFFINE_EXP.uncombine(a, t, 1)


class RevLib(Adapter):
    """Branches in a `ReversibleSequential`."""

    name = "revlib"
    package = "revlib"

    def affine(self) -> Adapter:
        other = copy.copy(self)
        other.formula = AFFINE_EXP
        return other

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        import revlib  # noqa: PLC0415

        branches = [branch for pair in pairs for branch in pair]
        couplings = {}
        if self.formula is AFFINE_EXP:
            couplings = {"coupling_forward": [_affine], "coupling_inverse": [_affine_undone]}
        return revlib.ReversibleSequential(
            *branches,
            split_dim=split_dim,
            **couplings,
        )

    def pairs(self, net: Net) -> list[Pair]:
        branches = [step.wrapped_module.wrapped_module for step in net]
        return list(zip(branches[::2], branches[1::2], strict=True))

    def blocks(self, net: Net) -> list[nn.Module]:
        return list(net)[1::2]

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        y0, y1 = y.chunk(2, net.split_dim)
        for step in reversed(list(net)):
            y0, y1 = step.wrapped_module.inverse(y0, y1), y0
        return torch.cat((y0, y1), net.split_dim)


class _CheckpointedChain(PlainChain):
    use_reentrant = False

    def run(self, block: nn.Module, *streams: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The reentrant mode gives gradients to positional arguments alone.
        def run(x1: Tensor, x2: Tensor, *values: Tensor) -> Any:
            return block(x1, x2, **dict(zip(kwargs, values, strict=True)))

        result: tuple[Tensor, Tensor] = checkpoint(
            run, *streams, *kwargs.values(), use_reentrant=self.use_reentrant
        )
        return result


class Checkpoint(Plain):
    """Plain blocks, each in `torch.utils.checkpoint.checkpoint`."""

    reference = False

    def __init__(self, name: str, *, use_reentrant: bool) -> None:
        super().__init__(ADDITIVE)
        self.name, self.use_reentrant = name, use_reentrant

    def build(self, pairs: list[Pair], split_dim: int = 1, **options: Any) -> Net:
        chain = _CheckpointedChain(pairs, self.formula, split_dim)
        chain.use_reentrant = self.use_reentrant
        return chain

    def inverse(self, net: Net, y: Tensor) -> Tensor:
        raise CannotAskError("has no inverse")

    def keep_inputs(self, net: Net) -> None:
        raise CannotAskError("keeps the input of every block by design")

    def streams(self, net: Net, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        for block in net.blocks:
            x1, x2 = net.run(block, x1, x2)
        return x1, x2


PEERS: list[Adapter] = [
    MemCNN(),
    RevTorch(),
    RevLib(),
    Checkpoint("checkpoint", use_reentrant=False),
    Checkpoint("checkpoint (reentrant)", use_reentrant=True),
]
